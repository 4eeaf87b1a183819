package events

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/go-json-experiment/json/jsontext"
)

// A source hands on every event that a broker has. Reading one with the SDK and writing it again costs more than all
// else that a source does, so the form in which our own publisher writes is carried over directly, and only what is
// different takes the long way. Both ways lead to the same event.

// CarryRecord appends, as JSON, the event that ReadRecord reads. It is one valid JSON object whatever the record holds.
func CarryRecord(b []byte, record *sarama.ConsumerMessage, source string) []byte {
	start := len(b)
	if b, ok := appendBinary(b, record); ok {
		return b
	}
	e := ReadRecord(record, source)
	b = AppendJSON(b, &e)
	if !jsontext.Value(b[start:]).IsValid() { // the SDK lets an extension be called data
		e = foreign(source, place(record), record.Value)
		b = AppendJSON(b[:start], &e)
	}
	return b
}

// CarryMessage appends, as JSON, the event that ReadMessage reads. It is one valid JSON object whatever the message holds.
func CarryMessage(b []byte, m *amqp.Message, source string) []byte {
	start := len(b)
	e := ReadMessage(m, source)
	b = AppendJSON(b, &e)
	if !jsontext.Value(b[start:]).IsValid() {
		e = foreign(source, messageID(m), body(m))
		b = AppendJSON(b[:start], &e)
	}
	return b
}

// CarryStructured appends a CloudEvent in JSON as it stands, and reports whether it did: if it is one, and its
// attributes are in the form in which AppendJSON writes them. One that is refused may still be a CloudEvent.
func CarryStructured(b, data []byte) ([]byte, bool) {
	d := decode(data)
	defer d.free()
	var v envelope
	if d.envelope(data, &v) != nil || d.end() != nil {
		return b, false
	}
	if string(v.specVersion) != `"1.0"` || !simple(v.id, MaxID) || !simple(v.typ, MaxSource) || !simple(v.source, MaxSource) ||
		!canonical(v.source[1:len(v.source)-1]) || v.dataSchema != nil || v.dataBase64 != nil {
		return b, false
	}
	if v.subject != nil && !simple(v.subject, MaxEvent) ||
		v.dataContentType != nil && string(v.dataContentType) != `"`+jsonMediaType+`"` {
		return b, false
	}
	if v.time != nil {
		if !simple(v.time, 64) {
			return b, false
		}
		if _, err := time.Parse(time.RFC3339Nano, string(v.time[1:len(v.time)-1])); err != nil {
			return b, false
		}
	}
	for _, m := range v.extensions {
		if !extensionName(m.name) || !simple(m.value, MaxEvent) {
			return b, false
		}
	}
	return append(b, data...), true
}

// simple reports whether a JSON value is a string that means what it looks like: printable ASCII without escapes, no
// space at its ends, at most most bytes.
func simple(value []byte, most int) bool {
	return len(value) >= 2 && value[0] == '"' && simpleText(value[1:len(value)-1], most)
}

func simpleText(text []byte, most int) bool {
	if len(text) == 0 || len(text) > most || text[0] == ' ' || text[len(text)-1] == ' ' {
		return false
	}
	for _, c := range text {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// canonical reports whether a URI reference is written as net/url would write it.
func canonical(uri []byte) bool {
	if string(uri) == DefaultSource {
		return true
	}
	u, err := url.Parse(string(uri))
	return err == nil && u.String() == string(uri)
}

func extensionName(name string) bool {
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return name != "" && name != "data"
}

// appendBinary appends the event of a record in binary mode, if it is in the form in which WriteRecord writes.
func appendBinary(b []byte, record *sarama.ConsumerMessage) ([]byte, bool) {
	var specVersion, id, source, typ, subject, at, contentType []byte
	var extensions [8]*sarama.RecordHeader
	extended := 0
	for _, h := range record.Headers {
		var slot *[]byte
		switch string(h.Key) {
		case "ce_specversion":
			slot = &specVersion
		case "ce_id":
			slot = &id
		case "ce_source":
			slot = &source
		case "ce_type":
			slot = &typ
		case "ce_subject":
			slot = &subject
		case "ce_time":
			slot = &at
		case "content-type":
			slot = &contentType
		case "ce_dataschema", "ce_datacontenttype", "ce_kafkaoffset", "ce_kafkapartition", "ce_kafkatopic":
			return b, false
		default:
			name := string(h.Key)
			attribute, is := strings.CutPrefix(name, "ce_")
			if !is {
				if strings.ToLower(name) != name {
					return b, false // it may be an attribute: the SDK reads names in any case
				}
				continue
			}
			if extended == len(extensions) || !extensionName(attribute) || !simpleText(h.Value, MaxEvent) {
				return b, false
			}
			for _, other := range extensions[:extended] {
				if string(other.Key) == name {
					return b, false
				}
			}
			extensions[extended] = h
			extended++
			continue
		}
		if *slot != nil || !simpleText(h.Value, MaxEvent) {
			return b, false
		}
		*slot = h.Value
	}
	if string(specVersion) != "1.0" || id == nil || typ == nil || source == nil || !canonical(source) {
		return b, false
	}
	if contentType != nil && string(contentType) != jsonMediaType {
		return b, false
	}
	if len(record.Value) > 0 && !jsontext.Value(record.Value).IsValid() {
		return b, false
	}
	var occurred time.Time
	if at != nil {
		var err error
		if occurred, err = time.Parse(time.RFC3339Nano, string(at)); err != nil {
			return b, false
		}
	}

	b = append(b, `{"specversion":"1.0","id":"`...)
	b = append(b, id...)
	b = append(b, `","source":"`...)
	b = append(b, source...)
	b = append(b, `","type":"`...)
	b = append(b, typ...)
	b = append(b, '"')
	if subject != nil {
		b = append(b, `,"subject":"`...)
		b = append(b, subject...)
		b = append(b, '"')
	}
	if at != nil {
		b = append(b, `,"time":"`...)
		b = occurred.AppendFormat(b, time.RFC3339Nano)
		b = append(b, '"')
	}
	if contentType != nil {
		b = append(b, `,"datacontenttype":"`...)
		b = append(b, contentType...)
		b = append(b, '"')
	}
	for _, h := range extensions[:extended] {
		b = append(b, `,"`...)
		b = append(b, h.Key[len("ce_"):]...)
		b = append(b, `":"`...)
		b = append(b, h.Value...)
		b = append(b, '"')
	}
	if len(record.Value) > 0 {
		b = append(b, `,"data":`...)
		b = append(b, record.Value...)
	}
	return append(b, '}'), true
}

// Extend returns the CloudEvent in JSON with extensions added or, where it has them, replaced.
func Extend(data []byte, extensions map[string]string) ([]byte, error) {
	e, err := Parse(data)
	if err != nil {
		return nil, err
	}
	for name, value := range extensions {
		if err := e.Context.SetExtension(name, value); err != nil {
			return nil, err
		}
	}
	return AppendJSON(make([]byte, 0, len(data)+64), &e), nil
}

// Recover reads the event that CarryRecord, CarryMessage or CarryStructured has appended. What Parse refuses, though the
// SDK has read it, must still be kept under its id.
func Recover(data []byte) event.Event {
	if e, err := Parse(data); err == nil {
		return e
	}
	var e event.Event
	if err := json.Unmarshal(data, &e); err == nil && e.Validate() == nil {
		return e
	}
	return foreign(DefaultSource, newID(), data)
}

// place is the id of a record that is no CloudEvent.
func place(record *sarama.ConsumerMessage) string {
	return fmt.Sprintf("partition:%d/offset:%d", record.Partition, record.Offset)
}
