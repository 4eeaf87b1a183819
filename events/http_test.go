package events

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/google/uuid"
)

var now = time.Date(2026, 8, 2, 12, 0, 0, 0, time.UTC)

const (
	gt          = `{"country":"GT","weather":"Sunny"}`
	envelopeGT  = `{"specversion":"1.0","id":"a","source":"/app","type":"dev.isobar.weather.report.v1","data":` + gt + `}`
	traceParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	otherTrace  = "00-11111111111111111111111111111111-2222222222222222-00"
)

// request makes a POST; headers are names and values in turn.
func request(body string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/reports", strings.NewReader(body))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r
}

// inBinary are the headers of an event in binary mode, and more.
func inBinary(more ...string) []string {
	return append([]string{
		"Ce-Specversion", "1.0", "Ce-Id", "a", "Ce-Source", "/app", "Ce-Type", Type, "Content-Type", "application/json",
	}, more...)
}

func as(contentType string, more ...string) []string {
	return append([]string{"Content-Type", contentType}, more...)
}

var (
	inJSON       = as("application/json")
	inStructured = as("application/cloudevents+json")
	inBatch      = as("application/cloudevents-batch+json")
)

func key(k string) []string { return as("application/json", "Idempotency-Key", k) }

// requestCases say under which identities ("SOURCE ID"; "new" for a UUIDv7 under DefaultSource) a request is taken, or
// which error refuses it.
var requestCases = []struct {
	name    string
	headers []string
	body    string
	want    []string
	err     error // of the same type; a *Violation's field and an *Indexed's index are compared too
}{
	{name: "plain: a report", headers: inJSON, body: gt, want: []string{"new"}},
	{name: "plain: with a charset", headers: as("Application/JSON; charset=UTF-8"), body: gt, want: []string{"new"}},
	{name: "plain: an array", headers: inJSON, body: "[" + gt + "," + gt + "]", want: []string{"new", "new"}},
	{name: "plain: a bare key is the id", headers: key("k-1"), body: gt, want: []string{DefaultSource + " k-1"}},
	{name: "plain: a quoted key is the id without its quotes", headers: key(`"k 1"`), body: gt, want: []string{DefaultSource + " k 1"}},
	{name: "plain: escapes in a quoted key", headers: key(`"a\"b\\"`), body: gt, want: []string{DefaultSource + ` a"b\`}},
	{name: "plain: the key of an array is KEY/INDEX", headers: key("k"), body: "[" + gt + "," + gt + "]", want: []string{DefaultSource + " k/0", DefaultSource + " k/1"}},
	{name: "plain: a key of 252 bytes", headers: key(strings.Repeat("k", 252)), body: "[" + gt + "]", want: []string{DefaultSource + " " + strings.Repeat("k", 252) + "/0"}},
	{name: "plain: a key of 253 bytes", headers: key(strings.Repeat("k", 253)), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: an empty key", headers: key(""), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: an empty quoted key", headers: key(`""`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a key of spaces is no id", headers: key(`"  "`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a key with a space at its end, which would be lost on Kafka", headers: key(`"k "`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a key whose quote does not end", headers: key(`"k`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a key with something behind its quote", headers: key(`"k";a=1`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a quote inside the key", headers: key(`"a"b"`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a bad escape in the key", headers: key(`"a\b"`), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: a key that is not ASCII", headers: key("ä"), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: two keys", headers: append(key("a"), "Idempotency-Key", "b"), body: gt, err: &Violation{Field: "Idempotency-Key"}},
	{name: "plain: attributes of a CloudEvent without its version", headers: as("application/json", "Ce-Id", "a", "Ce-Source", "/app"), body: gt, err: &Malformed{}},
	{name: "plain: an empty array", headers: inJSON, body: "[]", err: &Violation{}},
	{name: "plain: 1001 reports", headers: inJSON, body: "[" + strings.Repeat(gt+",", 1000) + gt + "]", err: &TooMany{}},
	{name: "plain: the second of two breaks a rule", headers: inJSON, body: `[` + gt + `,{"country":"XX","weather":"x"}]`, err: &Indexed{1, &Violation{Field: "country"}}},
	{name: "plain: the first of several that break a rule is named", headers: inJSON, body: `[` + gt + `,{"country":"GT"},{"weather":"x"}]`, err: &Indexed{1, &Violation{Field: "weather"}}},
	{name: "plain: broken JSON is said before a broken rule", headers: inJSON, body: `[{"country":"XX","weather":"x"},`, err: &Indexed{1, &Malformed{}}},

	{name: "binary: its own identity", headers: inBinary(), body: gt, want: []string{"/app a"}},
	{name: "binary: its own identity, not the key", headers: inBinary("Idempotency-Key", "k"), body: gt, want: []string{"/app a"}},
	{name: "binary: no content type", headers: inBinary()[:8], body: gt, want: []string{"/app a"}},
	{name: "binary, as KafkaSource writes it: a percent sign is one", headers: []string{"Ce-Specversion", "1.0", "Ce-Id", "a%41\xe9", "Ce-Source", "/app", "Ce-Type", Type, "Ce-Knativekafkaoffset", "7"}, body: gt, want: []string{"/app a%41é"}},
	{name: "binary: percent-encoded values", headers: []string{"Ce-Specversion", "1.0", "Ce-Id", "%C3%A4%20%25%zz", "Ce-Source", "/a%2Fb", "Ce-Type", Type}, body: gt, want: []string{"/a/b ä %%zz"}},
	{name: "binary: an extension is kept", headers: inBinary("Ce-Station", "north"), body: gt, want: []string{"/app a"}},
	{name: "binary: no id", headers: append([]string{"Ce-Specversion", "1.0", "Ce-Source", "/app", "Ce-Type", Type}, inJSON...), body: gt, err: &Violation{Field: "id"}},
	{name: "binary: an id twice", headers: inBinary("Ce-Id", "b"), body: gt, err: &Violation{Field: "ce-id"}},
	{name: "binary: an id that is not UTF-8", headers: []string{"Ce-Specversion", "1.0", "Ce-Id", "a%FF", "Ce-Source", "/app", "Ce-Type", Type}, body: gt, err: &Violation{Field: "ce-id"}},
	{name: "binary: data as an attribute", headers: inBinary("Ce-Data", "x"), body: gt, err: &Violation{Field: "ce-data"}},
	{name: "binary: an extension with a bad name", headers: inBinary("Ce-My-Name", "x"), body: gt, err: &Violation{Field: "my-name"}},
	{name: "binary: an older version", headers: append([]string{"Ce-Specversion", "0.3", "Ce-Id", "a", "Ce-Source", "/app", "Ce-Type", Type}, inJSON...), body: gt, err: &Violation{Field: "specversion"}},
	{name: "binary: data that is text", headers: append(inBinary()[:8], "Content-Type", "text/plain"), body: gt, err: &Violation{Field: "datacontenttype"}},
	{name: "binary: an array", headers: inBinary(), body: "[" + gt + "]", err: &Violation{}},
	{name: "binary: no body", headers: inBinary(), err: &Violation{Field: "data"}},
	{name: "binary and structured at once", headers: append(inBinary()[:8], inStructured...), body: envelopeGT, err: &Malformed{}},

	{name: "structured: its own identity", headers: inStructured, body: envelopeGT, want: []string{"/app a"}},
	{name: "structured: with a charset", headers: as("application/cloudevents+json; charset=utf-8"), body: envelopeGT, want: []string{"/app a"}},
	{name: "structured: data in base64", headers: inStructured, body: strings.Replace(envelopeGT, `"data":`+gt, `"data_base64":"eyJjb3VudHJ5IjoiR1QiLCJ3ZWF0aGVyIjoiU3VubnkifQ=="`, 1), want: []string{"/app a"}},
	{name: "structured: a batch", headers: inStructured, body: "[" + envelopeGT + "]", err: &Violation{}},
	{name: "structured: no version", headers: inStructured, body: gt, err: &Malformed{}},
	{name: "structured: another type", headers: inStructured, body: strings.Replace(envelopeGT, Type, "com.example", 1), err: &Violation{Field: "type"}},

	{name: "batch: each its own identity", headers: inBatch, body: "[" + envelopeGT + "," + strings.Replace(envelopeGT, `"a"`, `"b"`, 1) + "]", want: []string{"/app a", "/app b"}},
	{name: "batch: one event", headers: inBatch, body: envelopeGT, err: &Violation{}},
	{name: "batch: empty", headers: inBatch, body: "[]", err: &Violation{}},
	{name: "batch: the second is no event", headers: inBatch, body: "[" + envelopeGT + "," + gt + "]", err: &Indexed{1, &Malformed{}}},
	{name: "batch: the second breaks a rule", headers: inBatch, body: "[" + envelopeGT + "," + strings.Replace(envelopeGT, "Sunny", "", 1) + "]", err: &Indexed{1, &Violation{Field: "weather"}}},
	{name: "batch: 1001 events", headers: inBatch, body: "[" + strings.Repeat(envelopeGT+",", 1000) + envelopeGT + "]", err: &TooMany{}},

	{name: "no content type", body: gt, err: &UnsupportedMediaType{}},
	{name: "a form", headers: as("application/x-www-form-urlencoded"), body: gt, err: &UnsupportedMediaType{}},
	{name: "another charset", headers: as("application/json; charset=latin1"), body: gt, err: &UnsupportedMediaType{}},
	{name: "compressed", headers: as("application/json", "Content-Encoding", "gzip"), body: gt, err: &UnsupportedMediaType{}},
	{name: "another format of CloudEvents", headers: as("application/cloudevents+avro"), body: gt, err: &UnsupportedMediaType{}},
	{name: "a content type that is none", headers: as(";;"), body: gt, err: &UnsupportedMediaType{}},
}

func TestReadRequest(t *testing.T) {
	for _, c := range requestCases {
		t.Run(c.name, func(t *testing.T) {
			got, err := ReadRequest(request(c.body, c.headers...), []byte(c.body), now)
			if c.err != nil {
				if !alike(err, c.err) {
					t.Fatalf("the error is %#v (%v)", err, err)
				}
				if got != nil {
					t.Error("events are returned beside the error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(c.want) {
				t.Fatalf("%d events, want %d", len(got), len(c.want))
			}
			seen := map[string]bool{}
			for i := range got {
				identity := got[i].Source() + " " + got[i].ID()
				if id, err := uuid.Parse(got[i].ID()); c.want[i] == "new" {
					if err != nil || id.Version() != 7 || got[i].Source() != DefaultSource {
						t.Errorf("event %d is %s, not a UUIDv7 of our own", i, identity)
					}
				} else if identity != c.want[i] {
					t.Errorf("event %d is %s, want %s", i, identity, c.want[i])
				}
				if seen[identity] {
					t.Errorf("%s is there twice", identity)
				}
				seen[identity] = true
				if string(got[i].Data()) != gt || got[i].Subject() != "GT" || got[i].DataContentType() != "application/json" {
					t.Errorf("it is not in the form that travels: %s", got[i])
				}
			}
		})
	}
}

// alike compares the types of errors, and what they are about.
func alike(got, want error) bool {
	if a, ok := errors.AsType[*Indexed](got); ok {
		b, ok := errors.AsType[*Indexed](want)
		return ok && a.Index == b.Index && alike(a.Err, b.Err)
	}
	if a, ok := errors.AsType[*Violation](got); ok {
		b, ok := errors.AsType[*Violation](want)
		return ok && a.Field == b.Field && a.Rule != ""
	}
	return got != nil && fmt.Sprintf("%T", got) == fmt.Sprintf("%T", want)
}

func TestNormalize(t *testing.T) {
	sent := time.Date(2026, 8, 1, 10, 0, 0, 5, time.FixedZone("", 7200))
	long := func(n int) string { return strings.Repeat("x", n) }
	for _, c := range []struct {
		name   string
		change func(*event.Event)
		check  func(event.Event) bool // nil: it is refused
		field  string
	}{
		{"the country becomes upper case, in data and subject", func(e *event.Event) { e.DataEncoded = []byte(`{"country":"esp","weather":"x"}`) }, func(e event.Event) bool {
			return string(e.Data()) == `{"country":"ESP","weather":"x"}` && e.Subject() == "ESP"
		}, ""},
		{"a subject in another case is the country", func(e *event.Event) { e.SetSubject("gt") }, func(e event.Event) bool { return e.Subject() == "GT" }, ""},
		{"a subject that is another country", func(e *event.Event) { e.SetSubject("ES") }, nil, "subject"},
		{"a time is kept", func(e *event.Event) { e.SetTime(sent) }, func(e event.Event) bool { return e.Time().Equal(sent) }, ""},
		{"without a time it gets now", func(*event.Event) {}, func(e event.Event) bool { return e.Time().Equal(now) }, ""},
		{"a time that is in no year of four digits in UTC", func(e *event.Event) {
			e.SetTime(time.Date(9999, 12, 31, 23, 59, 0, 0, time.FixedZone("", -3600)))
		}, nil, "time"},
		{"a time before the year 0 in UTC", func(e *event.Event) {
			e.SetTime(time.Date(0, 1, 1, 0, 0, 0, 0, time.FixedZone("", 3600)))
		}, nil, "time"},
		{"unknown fields are dropped", func(e *event.Event) { e.DataEncoded = []byte(`{"x":[1],"weather":"x","country":"GT","y":{}}`) }, func(e event.Event) bool {
			return string(e.Data()) == `{"country":"GT","weather":"x"}`
		}, ""},
		{"a content type with +json becomes application/json", func(e *event.Event) { e.SetDataContentType("application/vnd.x+json; charset=utf-8") }, func(e event.Event) bool { return e.DataContentType() == "application/json" }, ""},
		{"without a content type it is JSON", func(e *event.Event) { e.SetDataContentType("") }, func(e event.Event) bool { return e.DataContentType() == "application/json" }, ""},
		{"an extension is kept", func(e *event.Event) { e.SetExtension("station", "north") }, func(e event.Event) bool { return e.Extensions()["station"] == "north" }, ""},
		{"an extension called data, which JSON can't hold", func(e *event.Event) { e.SetExtension("data", "x") }, nil, "data"},
		{"an id of 256 bytes", func(e *event.Event) { e.SetID(long(256)) }, func(event.Event) bool { return true }, ""},
		{"an id of 257 bytes", func(e *event.Event) { e.SetID(long(257)) }, nil, "id"},
		{"no id", func(e *event.Event) { e.Context.(*event.EventContextV1).ID = "" }, nil, "id"},
		{"an id with white space at its ends, which the SDK drops on Kafka", func(e *event.Event) { e.Context.(*event.EventContextV1).ID = "a " }, nil, "id"},
		{"an id of white space", func(e *event.Event) { e.Context.(*event.EventContextV1).ID = " \u00a0\t" }, nil, "id"},
		{"a source of 512 bytes", func(e *event.Event) { e.SetSource(long(512)) }, func(event.Event) bool { return true }, ""},
		{"a source of 513 bytes", func(e *event.Event) { e.SetSource(long(513)) }, nil, "source"},
		{"a source that has 513 bytes only once it is escaped", func(e *event.Event) { e.SetSource(long(508) + "ä") }, nil, "source"},
		{"another type", func(e *event.Event) { e.SetType("com.example") }, nil, "type"},
		{"another version", func(e *event.Event) { e.SetSpecVersion("0.3") }, nil, "specversion"},
		{"data that is text", func(e *event.Event) { e.SetDataContentType("text/plain") }, nil, "datacontenttype"},
		{"data in another charset", func(e *event.Event) { e.SetDataContentType("application/json; charset=latin1") }, nil, "datacontenttype"},
		{"no data", func(e *event.Event) { e.DataEncoded = nil }, nil, "data"},
		{"an extension that makes it more than 64 KiB", func(e *event.Event) { e.SetExtension("long", long(64<<10)) }, nil, ""},
		{"data of more than 64 KiB", func(e *event.Event) {
			e.DataEncoded = []byte(`{"country":"GT","weather":"x","y":"` + long(64<<10) + `"}`)
		}, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := event.New()
			e.SetID("1")
			e.SetSource("/app")
			e.SetType(Type)
			e.SetDataContentType("application/json")
			e.DataEncoded = []byte(gt)
			c.change(&e)
			before := e.Clone()
			err := Normalize(&e, now)
			if c.check == nil {
				if !alike(err, &Violation{Field: c.field}) {
					t.Fatalf("the error is %v, not one of %q", err, c.field)
				}
				if e.String() != before.String() {
					t.Errorf("it was changed all the same: %s", e)
				}
				return
			}
			if err != nil || !c.check(e) {
				t.Errorf("%v, %s", err, e)
			}
			once := e.String()
			if err := Normalize(&e, now.Add(time.Hour)); err != nil || e.String() != once {
				t.Errorf("a second time it is changed: %v, %s", err, e)
			}
		})
	}
}

func TestTraceContext(t *testing.T) {
	own := inBinary("Ce-Traceparent", otherTrace, "Traceparent", traceParent, "Tracestate", "a=1")
	for _, c := range []struct {
		name          string
		headers       []string
		body          string
		parent, state any
	}{
		{"the request's goes to the event", as("application/json", "Traceparent", traceParent, "Tracestate", "a=1"), gt, traceParent, "a=1"},
		{"the request's goes to every event of an array", as("application/json", "Traceparent", traceParent), "[" + gt + "," + gt + "]", traceParent, nil},
		{"the event's own stays", own, gt, otherTrace, nil},
		{"several tracestate headers are one list", as("application/json", "Traceparent", traceParent, "Tracestate", "a=1", "Tracestate", "b=2"), gt, traceParent, "a=1,b=2"},
		{"none", inJSON, gt, nil, nil},
		{"too short", as("application/json", "Traceparent", traceParent[1:]), gt, nil, nil},
		{"a version that is not known", as("application/json", "Traceparent", "ff"+traceParent[2:]), gt, nil, nil},
		{"capitals", as("application/json", "Traceparent", strings.ToUpper(traceParent)), gt, nil, nil},
		{"a trace id of zeros", as("application/json", "Traceparent", "00-"+strings.Repeat("0", 32)+traceParent[35:]), gt, nil, nil},
		{"a span id of zeros", as("application/json", "Traceparent", traceParent[:36]+strings.Repeat("0", 16)+"-01"), gt, nil, nil},
		{"other separators", as("application/json", "Traceparent", strings.ReplaceAll(traceParent, "-", "_")), gt, nil, nil},
		{"a tracestate without its parent", as("application/json", "Tracestate", "a=1"), gt, nil, nil},
		{"a tracestate that is not ASCII", as("application/json", "Traceparent", traceParent, "Tracestate", "a=\xff"), gt, traceParent, nil},
		{"a tracestate of more than 512 bytes", as("application/json", "Traceparent", traceParent, "Tracestate", strings.Repeat("a", 513)), gt, traceParent, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ReadRequest(request(c.body, c.headers...), []byte(c.body), now)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range got {
				if e.Extensions()[TraceParent] != c.parent || e.Extensions()[TraceState] != c.state {
					t.Errorf("got %v", e.Extensions())
				}
			}
		})
	}
}

func TestReadArrivals(t *testing.T) {
	wrapped := func(typ string) []string {
		return []string{
			"Ce-Specversion", "1.0", "Ce-Id", "partition:1/offset:2", "Ce-Source", "/apis/v1/namespaces/n/kafkasources/s#message",
			"Ce-Type", typ, "Ce-Subject", "partition:1#2", "Ce-Knativekafkapartition", "1", "Prefer", "reply",
		}
	}
	for _, c := range []struct {
		name    string
		headers []string
		body    string
		want    []Arrival
		err     error
	}{
		{"binary", inBinary(), gt, []Arrival{{"/app", "a", Report{Country: "GT", Weather: "Sunny"}}}, nil},
		{"structured", inStructured, envelopeGT, []Arrival{{"/app", "a", Report{Country: "GT", Weather: "Sunny"}}}, nil},
		{"structured: data of another type than JSON is a string's content", inStructured, strings.Replace(envelopeGT, `"data":`+gt, `"datacontenttype":"text/plain","data":"{\"country\":\"gt\",\"weather\":\"x\"}"`, 1), []Arrival{{"/app", "a", Report{Country: "GT", Weather: "x"}}}, nil},
		{"a batch", inBatch, "[" + envelopeGT + "," + envelopeGT + "]", slices.Repeat([]Arrival{{"/app", "a", Report{Country: "GT", Weather: "Sunny"}}}, 2), nil},
		{"an empty batch has none", inBatch, "[]", nil, nil},
		{"what Knative's Kafka source makes of plain JSON", wrapped("dev.knative.kafka.event"), gt, []Arrival{{"/apis/v1/namespaces/n/kafkasources/s#message", "partition:1/offset:2", Report{Country: "GT", Weather: "Sunny"}}}, nil},
		{"what Knative's RabbitMQ source makes of plain JSON", wrapped("dev.knative.rabbitmq.event"), gt, []Arrival{{"/apis/v1/namespaces/n/kafkasources/s#message", "partition:1/offset:2", Report{Country: "GT", Weather: "Sunny"}}}, nil},
		{"the subject is not looked at", inBinary("Ce-Subject", "ES"), gt, []Arrival{{"/app", "a", Report{Country: "GT", Weather: "Sunny"}}}, nil},

		{"another type", wrapped("com.example"), gt, nil, &Violation{Field: "type"}},
		{"a wrapped message that is no report", wrapped("dev.knative.kafka.event"), "hello", nil, &Malformed{}},
		{"a wrapped message without a body", wrapped("dev.knative.kafka.event"), "", nil, &Violation{Field: "data"}},
		{"plain JSON: a writer takes only events", inJSON, gt, nil, &UnsupportedMediaType{}},
		{"the second of a batch", inBatch, "[" + envelopeGT + "," + strings.Replace(envelopeGT, "GT", "XX", 1) + "]", nil, &Indexed{1, &Violation{Field: "country"}}},
		{"the second of a batch has no id", inBatch, "[" + envelopeGT + "," + strings.Replace(envelopeGT, `"id":"a",`, "", 1) + "]", nil, &Indexed{1, &Violation{Field: "id"}}},
		{"a batch that ends early", inBatch, "[" + envelopeGT, nil, &Indexed{1, &Malformed{}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ReadArrivals(request(c.body, c.headers...), []byte(c.body))
			if c.err != nil {
				if !alike(err, c.err) {
					t.Errorf("the error is %#v (%v)", err, err)
				}
			} else if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

// TestWhatTheWriterCounts: the two ways of reading a batch, with the event and without, agree.
func TestWhatTheWriterCounts(t *testing.T) {
	for _, c := range structuredCases {
		batch := []byte("[" + c.data + "]")
		arrivals, err := ParseArrivals(batch)
		if err != nil {
			continue
		}
		all, err := ParseBatch(batch)
		if err != nil {
			t.Errorf("%s is counted, but is no event: %v", batch, err)
			continue
		}
		for i := range all {
			if a, err := ParseArrival(&all[i]); err != nil || a != arrivals[i] {
				t.Errorf("%s is counted as %+v in a batch, as %+v, %v alone", batch, arrivals[i], a, err)
			}
		}
	}
}

func TestWriteBatch(t *testing.T) {
	for n := range 3 {
		var all []event.Event
		for i := range n {
			all = append(all, New(Report{Country: "GT", Weather: "x"}, fmt.Sprint(i), now))
		}
		body, contentType := WriteBatch(all)
		got, err := ReadArrivals(request("", "Content-Type", contentType), body)
		if err != nil || len(got) != n {
			t.Fatalf("%d events are read as %+v, %v", n, got, err)
		}
		for i, a := range got {
			if a != (Arrival{DefaultSource, fmt.Sprint(i), Report{Country: "GT", Weather: "x"}}) {
				t.Errorf("event %d is read as %+v", i, a)
			}
		}
	}
}

// FuzzRequest: whatever comes, the error is one that is documented, and what is taken survives every way on which it
// travels with its identity and its report.
func FuzzRequest(f *testing.F) {
	for _, c := range requestCases {
		var contentType, version, id, source, key string
		for i := 0; i < len(c.headers); i += 2 {
			switch c.headers[i] {
			case "Content-Type":
				contentType = c.headers[i+1]
			case "Ce-Specversion":
				version = c.headers[i+1]
			case "Ce-Id":
				id = c.headers[i+1]
			case "Ce-Source":
				source = c.headers[i+1]
			case "Idempotency-Key":
				key = c.headers[i+1]
			}
		}
		f.Add(contentType, version, id, source, key, "Ce-Station", "north", []byte(c.body))
	}
	f.Add("application/json", "", "", "", "", "Tracestate", "a=\xff", []byte(gt))
	f.Add("", "1.0", "a", "/app", "", "Ce-Time", "9999-12-31T23:59:59-01:00", []byte(gt))
	f.Add("", "1.0", "a", "HTTP://Ä/%zz", "", "Ce-Dataschema", "urn:x", []byte(gt))
	f.Fuzz(func(t *testing.T, contentType, version, id, source, key, name, value string, body []byte) {
		r := request("")
		for name, value := range map[string]string{
			"Content-Type": contentType, "Ce-Specversion": version, "Ce-Id": id, "Ce-Source": source,
			"Idempotency-Key": key, "Traceparent": traceParent, "Ce-Type": Type, http.CanonicalHeaderKey(name): value,
		} {
			if value != "" && (name != "Ce-Type" || version != "") {
				r.Header.Set(name, value)
			}
		}
		got, err := ReadRequest(r, body, now)
		if err != nil {
			if got != nil {
				t.Error("events beside an error")
			}
			documented(t, err)
			return
		}
		if len(got) == 0 || len(got) > MaxReports {
			t.Fatalf("%d events", len(got))
		}
		for i := range got {
			travels(t, &got[i])
		}
		arrivals, err := ReadArrivals(r, body)
		if err == nil && len(arrivals) != len(got) {
			t.Errorf("a writer reads %d of %d", len(arrivals), len(got))
		}
	})
}

// documented fails for an error that is none of those that reading may end with.
func documented(t *testing.T, err error) {
	t.Helper()
	for _, kind := range []any{new(*Malformed), new(*Violation), new(*UnsupportedMediaType), new(*TooMany)} {
		if errors.As(err, kind) {
			return
		}
	}
	t.Fatalf("an error of no documented type: %#v", err)
}

// travels sends an event on each way that there is, and expects to find it again as it was.
func travels(t *testing.T, e *event.Event) {
	t.Helper()
	if err := e.Validate(); err != nil {
		t.Fatalf("the SDK finds it invalid: %v\n%s", err, e)
	}
	want := describe(e)
	check := func(way string, got event.Event) {
		if !equal(describe(&got), want) {
			t.Errorf("by %s\ngot  %v\nwant %v", way, describe(&got), want)
		}
	}
	data := AppendJSON(nil, e)
	parsed, err := Parse(data)
	if err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	check("JSON", parsed)
	var sdk event.Event
	if err := sdk.UnmarshalJSON(bytes.Clone(data)); err != nil {
		t.Fatalf("the SDK can't read %s: %v", data, err)
	}
	check("JSON, read by the SDK", sdk)
	record, err := WriteRecord(e, "message")
	if err != nil {
		t.Fatal(err)
	}
	check("Kafka", ReadRecord(consumed(record), "/foreign"))
	check("AMQP", ReadMessage(WriteMessage(e), "/foreign"))
	batch, _ := WriteBatch([]event.Event{*e})
	a, err := ParseArrivals(batch)
	if err != nil || len(a) != 1 || a[0].Source != e.Source() || a[0].ID != e.ID() {
		t.Errorf("a writer reads %+v, %v from %s", a, err, batch)
	}
}
