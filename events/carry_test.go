package events

import (
	"encoding/json"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/go-json-experiment/json/jsontext"
)

func records(headers ...string) []*sarama.RecordHeader {
	var all []*sarama.RecordHeader
	for i := 0; i+1 < len(headers); i += 2 {
		all = append(all, &sarama.RecordHeader{Key: []byte(headers[i]), Value: []byte(headers[i+1])})
	}
	return all
}

const goodReport = `{"description":"Test","country":"GT","weather":"Sunny"}`

// binaryRecord is a record in binary mode with some headers more, of which an empty one takes a header away.
func binaryRecord(value string, more ...string) *sarama.ConsumerMessage {
	headers := []string{
		"ce_specversion", "1.0", "ce_id", "a-1", "ce_source", DefaultSource, "ce_type", Type,
		"ce_subject", "GT", "ce_time", "2026-08-01T10:00:00.5Z", "content-type", "application/json",
	}
	for i := 0; i < len(more); i += 2 {
		for j := 0; j < len(headers); j += 2 {
			if headers[j] == more[i] {
				headers = append(headers[:j], headers[j+2:]...)
				break
			}
		}
		if more[i+1] != "" {
			headers = append(headers, more[i], more[i+1])
		}
	}
	return &sarama.ConsumerMessage{Partition: 3, Offset: 7, Value: []byte(value), Headers: records(headers...)}
}

var recordCases = map[string]struct {
	record *sarama.ConsumerMessage
	direct bool // whether it is carried without the SDK
}{
	"as our publisher writes it":            {binaryRecord(goodReport), true},
	"with a trace context":                  {binaryRecord(goodReport, "ce_traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), true},
	"with another's header":                 {binaryRecord(goodReport, "x-trace", "1\"\n"), true},
	"another source":                        {binaryRecord(goodReport, "ce_source", "/mobile/app?x=1"), true},
	"another type":                          {binaryRecord(goodReport, "ce_type", "com.example.other"), true},
	"no data":                               {binaryRecord(""), true},
	"no content type":                       {binaryRecord(goodReport, "content-type", ""), true},
	"a source that net/url writes anew":     {binaryRecord(goodReport, "ce_source", "HTTP://a/ä"), false},
	"a source that is no URI":               {binaryRecord(goodReport, "ce_source", "http://[::1"), false},
	"an id with quotes":                     {binaryRecord(goodReport, "ce_id", `a"b\`), false},
	"an id that is not UTF-8":               {binaryRecord(goodReport, "ce_id", "a\xff"), false},
	"an id of spaces":                       {binaryRecord(goodReport, "ce_id", "  "), false},
	"an id longer than we take":             {binaryRecord(goodReport, "ce_id", strings.Repeat("i", MaxID+1)), true},
	"no id":                                 {binaryRecord(goodReport, "ce_id", ""), false},
	"an older spec version":                 {binaryRecord(goodReport, "ce_specversion", "0.3"), false},
	"a spec version that is not known":      {binaryRecord(goodReport, "ce_specversion", "7"), false},
	"a time that is none":                   {binaryRecord(goodReport, "ce_time", "yesterday"), false},
	"a time with an offset":                 {binaryRecord(goodReport, "ce_time", "2026-08-01T10:00:00.000+02:00"), true},
	"headers in capitals":                   {binaryRecord(goodReport, "ce_id", "", "CE_ID", "b-2"), false},
	"a header twice":                        {binaryRecord(goodReport, "CE_id", "b-2"), false},
	"an extension called data":              {binaryRecord(goodReport, "ce_data", "x"), false},
	"an extension with a bad name":          {binaryRecord(goodReport, "ce_a-b", "x"), false},
	"an extension with a capital":           {binaryRecord(goodReport, "ce_aB", "x"), false},
	"the names that the SDK adds":           {binaryRecord(goodReport, "ce_kafkaoffset", "x"), false},
	"a data schema":                         {binaryRecord(goodReport, "ce_dataschema", "https://isobar.dev/s"), false},
	"data that is no JSON":                  {binaryRecord(`{"country":`), false},
	"data with a name twice":                {binaryRecord(`{"a":1,"a":2}`), false},
	"data that ends the element":            {binaryRecord(`1},{"a":1`), false},
	"text":                                  {binaryRecord("hello", "content-type", "text/plain"), false},
	"structured":                            {&sarama.ConsumerMessage{Value: []byte(wellFormed), Headers: records("content-type", "application/cloudevents+json")}, false},
	"structured, an id longer than we take": {&sarama.ConsumerMessage{Value: []byte(strings.Replace(wellFormed, "a-1", strings.Repeat("i", MaxID+1), 1)), Headers: records("content-type", "application/cloudevents+json")}, false},
	"structured, broken":                    {&sarama.ConsumerMessage{Value: []byte(wellFormed[1:]), Headers: records("content-type", "application/cloudevents+json")}, false},
	"plain JSON":                            {&sarama.ConsumerMessage{Partition: 3, Offset: 7, Value: []byte(goodReport)}, false},
	"bytes":                                 {&sarama.ConsumerMessage{Partition: 3, Offset: 7, Value: []byte{0, 1, 0xff}}, false},
	"a tombstone":                           {&sarama.ConsumerMessage{Partition: 3, Offset: 7}, false},
}

const wellFormed = `{"specversion":"1.0","id":"a-1","source":"https://isobar.dev/reports","type":"dev.isobar.weather.report.v1","subject":"GT","time":"2026-08-01T10:00:00Z","datacontenttype":"application/json","data":` + goodReport + `}`

func TestCarryRecordEqualsReadRecord(t *testing.T) {
	for name, c := range recordCases {
		t.Run(name, func(t *testing.T) {
			carried := CarryRecord(nil, c.record, "/kafka/message")
			if !jsontext.Value(carried).IsValid() {
				t.Fatalf("not JSON: %s", carried)
			}
			read := ReadRecord(c.record, "/kafka/message")
			if name == "an extension called data" { // the one event that has no JSON: it is kept as foreign
				read = foreign("/kafka/message", place(c.record), c.record.Value)
			}
			same(t, carried, read)
			if _, direct := appendBinary(nil, c.record); direct != c.direct {
				t.Errorf("carried directly: %v, want %v", direct, c.direct)
			}
		})
	}
}

// same fails unless the JSON is that of the event.
func same(t *testing.T, carried []byte, want event.Event) {
	t.Helper()
	got := Recover(carried)
	a, b := members(t, AppendJSON(nil, &got)), members(t, AppendJSON(nil, &want))
	if !reflect.DeepEqual(a, b) {
		t.Errorf("got  %v\nwant %v\nfrom %s", a, b, carried)
	}
}

func members(t *testing.T, data []byte) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	if at, ok := m["time"].(string); ok {
		parsed, err := time.Parse(time.RFC3339Nano, at)
		if err != nil {
			t.Fatal(err)
		}
		m["time"] = parsed.UnixNano()
	}
	return maps.Clone(m)
}

var structuredCases = map[string]struct {
	data   string
	direct bool
}{
	"as our publisher writes it":     {wellFormed, true},
	"members in another order":       {`{"id":"1","type":"t","specversion":"1.0","source":"/s"}`, true},
	"white space around it":          {" \n" + wellFormed + "\t", true},
	"null members":                   {`{"specversion":"1.0","id":"1","source":"/s","type":"t","subject":null}`, true},
	"extensions":                     {`{"specversion":"1.0","id":"1","source":"/s","type":"t","traceparent":"00-1"}`, true},
	"an extension that is a number":  {`{"specversion":"1.0","id":"1","source":"/s","type":"t","n":7}`, false},
	"an extension that is an object": {`{"specversion":"1.0","id":"1","source":"/s","type":"t","n":{}}`, false},
	"an extension with a bad name":   {`{"specversion":"1.0","id":"1","source":"/s","type":"t","A-B":"x"}`, false},
	"escapes in the id":              {`{"specversion":"1.0","id":"a\u0041","source":"/s","type":"t"}`, false},
	"an id of spaces":                {`{"specversion":"1.0","id":"  ","source":"/s","type":"t"}`, false},
	"an id that is a number":         {`{"specversion":"1.0","id":1,"source":"/s","type":"t"}`, false},
	"no id":                          {`{"specversion":"1.0","source":"/s","type":"t"}`, false},
	"a source that is no URI":        {`{"specversion":"1.0","id":"1","source":"http://[::1","type":"t"}`, false},
	"a time that is none":            {`{"specversion":"1.0","id":"1","source":"/s","type":"t","time":"x"}`, false},
	"data in base64":                 {`{"specversion":"1.0","id":"1","source":"/s","type":"t","data_base64":"AAH/"}`, false},
	"an older version":               {`{"specversion":"0.3","id":"1","source":"/s","type":"t"}`, false},
	"a name twice":                   {`{"specversion":"1.0","id":"1","id":"2","source":"/s","type":"t"}`, false},
	"two elements":                   {wellFormed + "," + wellFormed, false},
	"an array":                       {"[" + wellFormed + "]", false},
	"cut":                            {wellFormed[:80], false},
	"nothing":                        {"", false},
}

func TestCarryStructuredEqualsParse(t *testing.T) {
	for name, c := range structuredCases {
		t.Run(name, func(t *testing.T) {
			carried, direct := CarryStructured([]byte("["), []byte(c.data))
			if direct != c.direct {
				t.Fatalf("carried directly: %v, want %v", direct, c.direct)
			}
			if !direct {
				if string(carried) != "[" {
					t.Errorf("%q was left behind", carried)
				}
				return
			}
			want, err := Parse([]byte(c.data))
			if err != nil {
				t.Fatalf("Parse refuses it: %v", err)
			}
			if err := want.Validate(); err != nil {
				t.Fatalf("the SDK refuses it: %v", err)
			}
			same(t, carried[1:], want)
		})
	}
}

func TestExtend(t *testing.T) {
	got, err := Extend([]byte(wellFormed), map[string]string{"cluster": "a", "traceparent": `"b"`})
	if err != nil {
		t.Fatal(err)
	}
	m := members(t, got)
	if m["cluster"] != "a" || m["traceparent"] != `"b"` || m["id"] != "a-1" {
		t.Errorf("got %s", got)
	}
	if !strings.Contains(string(got), goodReport) {
		t.Errorf("the data is not what it was: %s", got)
	}
}

func TestRecoverKeepsWhatParseRefuses(t *testing.T) {
	id := strings.Repeat("i", 2*MaxID)
	carried := CarryRecord(nil, binaryRecord(goodReport, "ce_id", id), "/kafka/message")
	e := Recover(carried)
	if e.ID() != id || string(e.Data()) != goodReport {
		t.Errorf("got %v", e)
	}
}

func FuzzCarryRecord(f *testing.F) {
	for _, c := range recordCases {
		var headers [6]string
		for i, h := range c.record.Headers {
			if i < 3 {
				headers[2*i], headers[2*i+1] = string(h.Key), string(h.Value)
			}
		}
		f.Add(c.record.Value, headers[0], headers[1], headers[2], headers[3], headers[4], headers[5])
	}
	f.Fuzz(func(t *testing.T, value []byte, k1, v1, k2, v2, k3, v3 string) {
		record := binaryRecord(string(value))
		record.Headers = append(records(k1, v1, k2, v2, k3, v3), record.Headers...)
		carried := CarryRecord(nil, record, "/kafka/message")
		if !jsontext.Value(carried).IsValid() || jsontext.Value(carried).Kind() != '{' {
			t.Fatalf("not one JSON object: %q", carried)
		}
		if _, direct := appendBinary(nil, record); direct {
			same(t, carried, ReadRecord(record, "/kafka/message"))
		}
	})
}

func FuzzCarryMessage(f *testing.F) {
	for _, c := range structuredCases {
		f.Add([]byte(c.data), "application/cloudevents+json", "cloudEvents:id", "1", "m-1")
	}
	f.Add([]byte(goodReport), "application/json", "cloudEvents:specversion", "1.0", "m-1")
	f.Add([]byte(goodReport), "text/plain", "cloudEvents:data", "x\xff", "m-1")
	f.Fuzz(func(t *testing.T, data []byte, contentType, name, value, id string) {
		m := &amqp.Message{
			Properties: &amqp.MessageProperties{ContentType: &contentType, MessageID: id},
			ApplicationProperties: map[string]any{
				"cloudEvents:specversion": "1.0", "cloudEvents:id": "1", "cloudEvents:source": "/s",
				"cloudEvents:type": "t", name: value,
			},
			Data: [][]byte{data},
		}
		carried := CarryMessage(nil, m, "/rabbitmq/message")
		if !jsontext.Value(carried).IsValid() || jsontext.Value(carried).Kind() != '{' {
			t.Fatalf("not one JSON object: %q", carried)
		}
		if carried, direct := CarryStructured(nil, data); direct {
			want, err := Parse(data)
			if err != nil || want.Validate() != nil {
				t.Fatalf("carried what is no event: %v", err)
			}
			same(t, carried, want)
		}
	})
}

func BenchmarkCarryRecord(b *testing.B) {
	record := binaryRecord(goodReport)
	var buf []byte
	b.Run("direct", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			buf = CarryRecord(buf[:0], record, "/kafka/message")
		}
	})
	b.Run("by the SDK", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			e := ReadRecord(record, "/kafka/message")
			buf = AppendJSON(buf[:0], &e)
		}
	})
}

func BenchmarkCarryStructured(b *testing.B) {
	data := []byte(wellFormed)
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf, _ = CarryStructured(buf[:0], data)
	}
}
