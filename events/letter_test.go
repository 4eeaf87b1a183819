package events

import (
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
)

// TestReadLettersEqualsTheEvent: what comes in any mode of HTTP is the same event in the topic.
func TestReadLettersEqualsTheEvent(t *testing.T) {
	for name, e := range sdkEvents() {
		if name == "JSON data: null" {
			continue // which is no data in a CloudEvent in JSON
		}
		t.Run(name, func(t *testing.T) {
			want := describe(&e)
			check := func(mode string, h http.Header, body []byte) {
				t.Helper()
				letters, err := ReadLetters(h, body, "message.dead")
				if err != nil || len(letters) != 1 {
					t.Fatalf("%s: %d letters, %v", mode, len(letters), err)
				}
				if key, _ := letters[0].Key.Encode(); string(key) != e.ID() || letters[0].Topic != "message.dead" {
					t.Errorf("%s: key %q, topic %q", mode, key, letters[0].Topic)
				}
				got := ReadRecord(consumed(letters[0]), "/dead")
				if !equal(describe(&got), want) {
					t.Errorf("%s: got  %v\nwant %v", mode, describe(&got), want)
				}
			}
			r := httptest.NewRequest(http.MethodPost, "/", nil)
			if err := cehttp.WriteRequest(t.Context(), (*binding.EventMessage)(&e), r); err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Fatal(err)
			}
			check("binary", r.Header, body)
			check("structured", http.Header{"Content-Type": {structuredMediaType}}, AppendJSON(nil, &e))
			body, contentType := WriteBatch([]event.Event{e})
			check("batch", http.Header{"Content-Type": {contentType}}, body)
		})
	}
}

// letterCases are what is posted to a dead letter sink, and what is in the topic then.
var letterCases = []struct {
	name    string
	headers []string
	body    string
	want    []map[string]string // of each record, some of its headers; "" is the key
	err     error
}{
	{
		name: "as KafkaSource posts what is refused", headers: inBinary("Ce-Knativekafkapartition", "3", "Ce-Knativekafkaoffset", "7",
			"Ce-Knativeerrordest", "http://redis-writer.isobar.svc.cluster.local", "Ce-Knativeerrorcode", "422",
			"Ce-Knativeerrordata", base64.StdEncoding.EncodeToString([]byte(`{"status":422}`)), "Prefer", "reply", "Kn-Namespace", "isobar"),
		body: gt,
		want: []map[string]string{{
			"": "a", "ce_id": "a", "ce_source": "/app", "ce_type": Type, "ce_specversion": "1.0", "content-type": "application/json",
			"ce_knativekafkapartition": "3", "ce_knativekafkaoffset": "7", "ce_knativeerrordest": "http://redis-writer.isobar.svc.cluster.local",
			"ce_knativeerrorcode": "422", "ce_knativeerrordata": "eyJzdGF0dXMiOjQyMn0=", "prefer": "", "kn-namespace": "",
		}},
	},
	{
		name: "as KafkaSource posts a record that is no CloudEvent", headers: []string{
			"Ce-Specversion", "1.0", "Ce-Id", "partition:3/offset:7", "Ce-Source", "/apis/v1/namespaces/isobar/kafkasources/reports#message",
			"Ce-Type", "dev.knative.kafka.event", "Ce-Subject", "partition:3#7", "Ce-Time", "2026-08-01T10:00:00.5Z", "Ce-Kafkaheaderxy", "",
		}, body: "\x00\xff",
		want: []map[string]string{{"": "partition:3/offset:7", "ce_subject": "partition:3#7", "ce_time": "2026-08-01T10:00:00.5Z", "content-type": ""}},
	},
	{
		name: "as KafkaSource posts a record that only claims to be a CloudEvent", body: envelopeGT[1:],
		headers: append(inBinary()[:8], inStructured...),
		want:    []map[string]string{{"ce_id": "a", "content-type": "", "ce_datacontenttype": "application/cloudevents+json"}},
	},
	{
		name: "no answer: no code", headers: inBinary("Ce-Knativeerrordest", "http://a"), body: gt,
		want: []map[string]string{{"ce_knativeerrordest": "http://a", "ce_knativeerrorcode": ""}},
	},
	{name: "no data", headers: inBinary(), want: []map[string]string{{"": "a"}}},
	{name: "an id and a source beyond our limits", headers: []string{
		"Ce-Specversion", "1.0", "Ce-Id", strings.Repeat("i", 5000), "Ce-Source", "/" + strings.Repeat("s", 5000), "Ce-Type", "t",
	}, want: []map[string]string{{"": strings.Repeat("i", 5000), "ce_source": "/" + strings.Repeat("s", 5000)}}},
	{name: "percent signs, which KafkaSource does not encode", headers: inBinary("Ce-Subject", "100%, %2F"), want: []map[string]string{{"ce_subject": "100%, %2F"}}},
	{name: "UTF-8", headers: inBinary("Ce-Subject", "ä ☀"), want: []map[string]string{{"ce_subject": "ä ☀"}}},
	{name: "ISO 8859-1", headers: inBinary("Ce-Subject", "\xe4 \xdf"), want: []map[string]string{{"ce_subject": "ä ß"}}},
	{name: "a header twice", headers: inBinary("Ce-Subject", "a", "Ce-Subject", "b"), want: []map[string]string{{"ce_subject": "a, b"}}},
	{name: "a time that is none", headers: inBinary("Ce-Time", "+55861-01-01T00:00:00Z"), want: []map[string]string{{"ce_time": "+55861-01-01T00:00:00Z"}}},
	{name: "an extension called data", headers: inBinary("Ce-Data", "x"), want: []map[string]string{{"ce_data": "x"}}},
	{name: "an older version", headers: append([]string{"Ce-Specversion", "0.3"}, inBinary()[2:]...), want: []map[string]string{{"ce_specversion": "0.3"}}},
	{name: "structured", headers: inStructured, body: envelopeGT, want: []map[string]string{{"": "a", "ce_id": "a", "ce_type": Type}}},
	{name: "structured: an id beyond our limits", headers: inStructured, body: strings.Replace(envelopeGT, `"a"`, `"`+strings.Repeat("a", 300)+`"`, 1), want: []map[string]string{{"": strings.Repeat("a", 300)}}},
	{
		name: "structured: a CloudEvent in a CloudEvent", headers: inStructured,
		body: strings.Replace(envelopeGT, `"data":`, `"datacontenttype":"application/CloudEvents+json","data":`, 1),
		want: []map[string]string{{"content-type": "", "ce_datacontenttype": "application/CloudEvents+json"}},
	},
	{name: "a batch", headers: inBatch, body: "[" + envelopeGT + "," + strings.Replace(envelopeGT, `"a"`, `"b"`, 1) + "]", want: []map[string]string{{"": "a"}, {"": "b"}}},

	{name: "plain JSON", headers: inJSON, body: gt, err: &UnsupportedMediaType{}},
	{name: "nothing at all", err: &UnsupportedMediaType{}},
	{name: "binary: no version", headers: inBinary()[2:], body: gt, err: &Malformed{}},
	{name: "binary: no id", headers: append(inBinary()[:2:2], inBinary()[4:]...), body: gt, err: &Malformed{}},
	{name: "binary: an empty source", headers: []string{"Ce-Specversion", "1.0", "Ce-Id", "a", "Ce-Source", "", "Ce-Type", "t"}, body: gt, err: &Malformed{}},
	{name: "binary: no type", headers: inBinary()[:6:6], body: gt, err: &Malformed{}},
	{name: "structured: broken JSON", headers: inStructured, body: envelopeGT[1:], err: &Malformed{}},
	{name: "structured: no object", headers: inStructured, body: `7`, err: &Violation{}},
	{name: "structured: data_base64 that is a number, on which the SDK panics", headers: inStructured, body: strings.Replace(envelopeGT, `"data":`+gt, `"data_base64":7`, 1), err: &Violation{Field: "data_base64"}},
	{name: "structured: no source", headers: inStructured, body: `{"specversion":"1.0","id":"a","type":"t"}`, err: &Violation{Field: "source"}},
	{name: "a batch: the second is none", headers: inBatch, body: "[" + envelopeGT + ",{}]", err: &Indexed{1, &Malformed{}}},
}

func TestReadLetters(t *testing.T) {
	for _, c := range letterCases {
		t.Run(c.name, func(t *testing.T) {
			letters, err := ReadLetters(request("", c.headers...).Header, []byte(c.body), "message.dead")
			if c.err != nil {
				if !alike(err, c.err) || len(letters) > 0 {
					t.Errorf("%d letters, and the error is %T: %v", len(letters), err, err)
				}
				return
			}
			if err != nil || len(letters) != len(c.want) {
				t.Fatalf("%d letters, %v", len(letters), err)
			}
			for i, want := range c.want {
				got := map[string]string{}
				key, _ := letters[i].Key.Encode()
				got[""] = string(key)
				for _, h := range letters[i].Headers {
					got[string(h.Key)] += string(h.Value)
				}
				for name, value := range want {
					if got[name] != value {
						t.Errorf("%q is %q, not %q", name, got[name], value)
					}
				}
			}
		})
	}
}

// FuzzReadLetters: nothing makes it panic, and whatever it takes reads as one valid event.
func FuzzReadLetters(f *testing.F) {
	for _, c := range letterCases {
		h := request("", c.headers...).Header
		f.Add([]byte(c.body), h.Get("Content-Type"), h.Get("Ce-Specversion"), "Ce-Id", h.Get("Ce-Id"), "Ce-Source", h.Get("Ce-Source"), "Ce-Time", h.Get("Ce-Time"))
	}
	f.Fuzz(func(t *testing.T, body []byte, contentType, version, k1, v1, k2, v2, k3, v3 string) {
		r := request("", "Content-Type", contentType, "Ce-Specversion", version, "Ce-Type", "t", k1, v1, k2, v2, k3, v3)
		letters, err := ReadLetters(r.Header, body, "message.dead")
		if (err == nil) == (letters == nil) {
			t.Fatalf("%d letters, %v", len(letters), err)
		}
		for _, letter := range letters {
			e := ReadRecord(consumed(letter), "/dead")
			if err := e.Validate(); err != nil {
				t.Errorf("%v: %s", err, e)
			}
		}
	})
}
