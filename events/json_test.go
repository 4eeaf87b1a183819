package events

import (
	"bytes"
	"encoding/json"
	"maps"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"github.com/go-json-experiment/json/jsontext"
)

// describe is what an event says: its attributes and extensions as CloudEvents writes them in text, and its data.
func describe(e *event.Event) map[string]string {
	all := map[string]string{
		"specversion": e.SpecVersion(), "id": e.ID(), "source": e.Source(), "type": e.Type(), "subject": e.Subject(),
		"datacontenttype": e.DataContentType(), "dataschema": e.DataSchema(), "(data)": string(e.Data()),
	}
	if jsontext.Value(e.Data()).IsValid() {
		all["(data)"] = strings.TrimSpace(all["(data)"])
	}
	if !e.Time().IsZero() {
		all["time"] = e.Time().UTC().Format(time.RFC3339Nano)
	}
	for name, value := range e.Extensions() {
		all["extension "+name], _ = types.Format(value)
	}
	return all
}

func equal(a, b map[string]string) bool { return maps.Equal(a, b) }

// sdkEvents are events of every kind, as the SDK makes them.
func sdkEvents() map[string]event.Event {
	all := map[string]event.Event{}
	add := func(name string, change func(*event.Event)) {
		e := event.New()
		e.SetID("a-1")
		e.SetSource("https://example.com/stations/1?x=y#z")
		e.SetType("com.example.type")
		change(&e)
		all[name] = e
	}
	add("only what must be", func(*event.Event) {})
	add("a report", func(e *event.Event) { *e = New(Report{"Té\u2028st \"x\"", "GT", "☀️"}, "1", now) })
	add("texts of all kinds", func(e *event.Event) {
		e.SetID("\"\\/\b\f\n\r\t\u0001\u007f é ☀️ 𝄞 <script>&\u2028")
		e.SetSubject("\u0000 x\\y")
		e.SetType("ä/ö")
	})
	for name, source := range map[string]string{
		"relative": "/a/b", "with a colon": "./a:b", "a URN": "urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8", "with escapes": "/a%2Fb/%C3%A4?ä=%26#ö",
		"an address": "mailto:a@example.com", "no path": "//example.com", "IPv6": "http://[::1]:80/",
	} {
		add("a source: "+name, func(e *event.Event) { e.SetSource(source) })
	}
	add("a time with a zone and nanoseconds", func(e *event.Event) { e.SetTime(time.Date(2026, 8, 1, 1, 2, 3, 456789012, time.FixedZone("", -34200))) })
	add("a data schema", func(e *event.Event) { e.SetDataSchema("https://example.com/s?a=b") })
	add("extensions of all types", func(e *event.Event) {
		u := url.URL{Scheme: "https", Host: "example.com", Path: "/ä"}
		for name, value := range map[string]any{
			"text": "a\"b\u2028", "empty": "", "yes": true, "no": false, "zero": 0, "most": int32(1<<31 - 1), "least": int32(-1 << 31), "bytes": []byte{0, 255},
			"uri": types.URI{URL: u}, "uriref": types.URIRef{URL: url.URL{Path: "/x"}}, "time": types.Timestamp{Time: now.Add(time.Nanosecond)},
		} {
			if name != "time" {
				e.SetExtension(name, value)
			} else {
				e.SetExtension("when", value)
			}
		}
	})
	for name, data := range map[string]string{"an object": `{"a":[1,2.50,"x"]}`, "a string": `"x"`, "a number": `1e400`, "null": `null`, "with white space": " [ 1 ] "} {
		add("JSON data: "+name, func(e *event.Event) {
			e.SetDataContentType("application/json")
			e.DataEncoded = []byte(data)
		})
	}
	add("JSON data without a content type", func(e *event.Event) { e.DataEncoded = []byte(`{"a":1}`) })
	add("JSON data in bytes", func(e *event.Event) { _ = e.SetData("application/json", []byte(`{"a":1}`)) })
	add("data that is no JSON though it says so", func(e *event.Event) { _ = e.SetData("application/json", []byte(`{"a":`)) })
	add("a CloudEvent as data", func(e *event.Event) { _ = e.SetData("application/cloudevents+json", []byte(envelopeGT)) })
	add("text", func(e *event.Event) { _ = e.SetData("text/plain", "x \"y\"\n") })
	add("text of quotes", func(e *event.Event) { _ = e.SetData("text/plain; charset=utf-8", `"x"`) })
	add("bytes", func(e *event.Event) { _ = e.SetData("application/octet-stream", []byte{0, 1, 0xff, '"'}) })
	return all
}

func TestTheSDKReadsWhatWeWrite(t *testing.T) {
	for name, e := range sdkEvents() {
		t.Run(name, func(t *testing.T) {
			data := AppendJSON([]byte("before"), &e)[len("before"):]
			if !jsontext.Value(data).IsValid() {
				t.Fatalf("not JSON: %s", data)
			}
			var sdk event.Event
			if err := json.Unmarshal(data, &sdk); err != nil {
				t.Fatalf("%v in %s", err, data)
			}
			if got, want := describe(&sdk), describe(&e); !equal(got, want) {
				t.Errorf("got  %v\nwant %v\nfrom %s", got, want, data)
			}
		})
	}
}

func TestWeReadWhatTheSDKWrites(t *testing.T) {
	for name, e := range sdkEvents() {
		if name == "data that is no JSON though it says so" {
			continue // the SDK writes it in base64 only if it was told to
		}
		t.Run(name, func(t *testing.T) {
			data, err := e.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			if name == "JSON data: null" {
				e.DataEncoded = nil // null is what isn't there
			}
			got, err := Parse(data)
			if err != nil {
				t.Fatalf("%v in %s", err, data)
			}
			if got, want := describe(&got), describe(&e); !equal(got, want) {
				t.Errorf("got  %v\nwant %v\nfrom %s", got, want, data)
			}
			var sdk event.Event
			if err := json.Unmarshal(data, &sdk); err != nil {
				t.Fatal(err)
			}
			if len(sdk.Extensions()) > 0 && !reflect.DeepEqual(got.Extensions(), sdk.Extensions()) {
				t.Errorf("extensions are of other types: %#v, the SDK's %#v", got.Extensions(), sdk.Extensions())
			}
		})
	}
}

// differs names the documented differences between what we take and what the SDK's reader (v2.16.2) makes of the same.
func differs(data []byte, e *event.Event) string {
	var members map[string]json.RawMessage
	if json.Unmarshal(data, &members) != nil {
		return "names that are equal but for their escapes"
	}
	for name, value := range members {
		switch whole := any(nil); {
		case string(value) == "null":
			return "a member that is null: absent, as the JSON format has it; the SDK sees an empty one"
		case json.Unmarshal(value, &whole) != nil:
			return "a number that is no float64: the SDK stumbles over some"
		case name == "data_base64" && bytes.IndexByte(value, '\\') >= 0:
			return "escapes in data_base64: the SDK decodes them only sometimes"
		}
	}
	if mediaType, _ := e.Context.GetDataMediaType(); mediaType != jsonMediaType && mediaType != "text/json" && mediaType != "" && members["data"] != nil {
		return "data of another type than JSON: the SDK knows neither +json nor capitals, and takes strings only"
	}
	return ""
}

// FuzzParse: what we take the SDK takes as the same event, and no input makes us panic.
func FuzzParse(f *testing.F) {
	for _, e := range sdkEvents() {
		f.Add(AppendJSON(nil, &e))
		if data, err := e.MarshalJSON(); err == nil {
			f.Add(data)
		}
	}
	for _, c := range structuredCases {
		f.Add([]byte(c.data))
	}
	f.Add([]byte(`{"data_base64":7,"specversion":"1.0","id":"1","source":"/","type":"t"}`)) // the SDK panics
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := Parse(data)
		if err != nil {
			documented(t, err)
			return
		}
		want := describe(&e)
		if again, err := Parse(AppendJSON(nil, &e)); err != nil || !equal(describe(&again), want) {
			// A string of ours that is no RFC 3339 any more is one that Normalize refuses.
			if bad := Normalize(&e, now); bad == nil {
				t.Errorf("written and read again: %v\ngot  %v\nwant %v", err, describe(&again), want)
			}
		}
		if differs(data, &e) != "" {
			return
		}
		var sdk event.Event
		if err := sdk.UnmarshalJSON(bytes.Clone(data)); err != nil {
			t.Fatalf("the SDK does not take %s: %v", data, err)
		}
		if got := describe(&sdk); !equal(got, want) {
			t.Errorf("the SDK reads %v\nwe %v\nfrom %s", got, want, data)
		}
	})
}

func TestParseErrorsSayWhatAndWhere(t *testing.T) {
	with := func(members string) string {
		return `{"specversion":"1.0","id":"1","source":"/","type":"t",` + members + `}`
	}
	for _, c := range []struct{ name, json, says string }{
		{"broken JSON says where", `{"specversion":"1.0" "id"`, "offset 21"},
		{"no version", `{"id":"1"}`, "specversion is missing"},
		{"two versions", `{"specversion":"1.0","specversion":"1.0"}`, "duplicate"},
		{"a version that is a number", `{"specversion":1.0}`, `specversion must be "1.0", not 1.0`},
		{"an id that is a number", `{"specversion":"1.0","id":1,"source":"/","type":"t"}`, "id must be a string of 1 to 256 bytes without white space at its ends, not 1"},
		{"a source that is no URI", `{"specversion":"1.0","id":"1","source":"http://[::1","type":"t"}`, "source must be a URI reference"},
		{"a subject that is empty", with(`"subject":""`), "subject must be"},
		{"a time that is none", with(`"time":"yesterday"`), "time must be an RFC 3339 timestamp"},
		{"a schema that is no absolute URI", with(`"dataschema":"x"`), "dataschema must be an absolute URI"},
		{"an extension that is an object", with(`"x":{}`), "x must be a string, a boolean or an integer of 32 bits, not {}"},
		{"an extension of 33 bits", with(`"x":4294967296`), "x must be"},
		{"an extension with a bad name", with(`"A":"x"`), "A is no attribute name"},
		{"base64 that is none", with(`"data_base64":"%"`), "data_base64 must be a base64 string"},
		{"base64 that is a number", with(`"data_base64":7`), "data_base64 must be a base64 string"},
		{"data twice", with(`"data":1,"data_base64":""`), "data_base64 must not stand beside data"},
		{"a long value is shown only in part", with(`"time":"` + strings.Repeat("x", 1000) + `"`), strings.Repeat("x", 99) + "…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Parse([]byte(c.json)); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("says %v, want %s", err, c.says)
			}
		})
	}
}
