package events

import (
	"context"
	"strings"
	"testing"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	ceamqp "github.com/cloudevents/sdk-go/protocol/amqp/v2"
	kafka "github.com/cloudevents/sdk-go/protocol/kafka_sarama/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
)

// consumed is the record as a consumer gets it.
func consumed(p *sarama.ProducerMessage) *sarama.ConsumerMessage {
	record := &sarama.ConsumerMessage{Topic: p.Topic, Partition: 3, Offset: 7}
	if p.Value != nil {
		record.Value, _ = p.Value.Encode()
	}
	for _, h := range p.Headers {
		record.Headers = append(record.Headers, &h)
	}
	return record
}

// ours are events as they leave the publisher.
func ours(t testing.TB) map[string]event.Event {
	t.Helper()
	all := map[string]event.Event{"a plain report": New(Report{"Té\u2028st", "GT", "☀️"}, "1", now)}
	for name, headers := range map[string][]string{
		"a source that is escaped": {"Ce-Specversion", "1.0", "Ce-Id", "1", "Ce-Source", "HTTP://Example.com/ä b?q=ö#ü", "Ce-Type", Type},
		"attributes of all kinds": inBinary("Ce-Time", "2026-08-01T10:00:00.123456789+02:00", "Ce-Dataschema", "https://isobar.dev/s",
			"Ce-Subject", "GT", "Ce-Station", "n\"ö\n%0A", "Traceparent", traceParent, "Tracestate", "a=1"),
	} {
		read, err := ReadRequest(request(gt, headers...), []byte(gt), now)
		if err != nil {
			t.Fatal(name, err)
		}
		all[name] = read[0]
	}
	read, err := Parse([]byte(`{"specversion":"1.0","id":"\u0001 é","source":"x","type":"` + Type + `","yes":true,"n":-7,"data":` + gt + `}`))
	if err == nil {
		err = Normalize(&read, now)
	}
	if err != nil {
		t.Fatal(err)
	}
	all["extensions that are no strings"] = read
	return all
}

func TestTravels(t *testing.T) {
	for name, e := range ours(t) {
		t.Run(name, func(t *testing.T) { travels(t, &e) })
	}
}

func TestRecord(t *testing.T) {
	for name, e := range ours(t) {
		t.Run(name, func(t *testing.T) {
			record, err := WriteRecord(&e, "message")
			if err != nil {
				t.Fatal(err)
			}
			if key, _ := record.Key.Encode(); string(key) != e.ID() || record.Topic != "message" {
				t.Errorf("key %q, topic %q", key, record.Topic)
			}
			if e.Extensions()["partitionkey"] != nil {
				t.Error("the key has become an extension of the event")
			}
			sdk, err := binding.ToEvent(context.Background(), kafka.NewMessageFromConsumerMessage(consumed(record)))
			if err != nil {
				t.Fatal(err)
			}
			for _, added := range []string{"kafkaoffset", "kafkapartition", "kafkatopic"} {
				sdk.SetExtension(added, nil)
			}
			if got, want := describe(sdk), describe(&e); !equal(got, want) {
				t.Errorf("the SDK reads %v\nwant %v", got, want)
			}
		})
	}
}

func TestForeignRecords(t *testing.T) {
	for name, c := range recordCases {
		t.Run(name, func(t *testing.T) {
			e := ReadRecord(c.record, "/kafka/message")
			if err := e.Validate(); err != nil {
				t.Errorf("not valid: %v", err)
			}
			if again := ReadRecord(c.record, "/kafka/message"); !equal(describe(&e), describe(&again)) {
				t.Errorf("read twice it is two events: %s %s", e, again)
			}
		})
	}
	for name, identity := range map[string]string{
		"plain JSON": "/kafka/message partition:3/offset:7", "bytes": "/kafka/message partition:3/offset:7",
		"a tombstone": "/kafka/message partition:3/offset:7", "no id": "/kafka/message partition:3/offset:7",
		"structured": DefaultSource + " a-1", "structured, an id longer than we take": DefaultSource + " " + strings.Repeat("i", MaxID+1), "as our publisher writes it": DefaultSource + " a-1",
	} {
		e := ReadRecord(recordCases[name].record, "/kafka/message")
		if got := e.Source() + " " + e.ID(); got != identity {
			t.Errorf("%s has the identity %s, want %s", name, got, identity)
		}
	}
	e := ReadRecord(recordCases["plain JSON"].record, "/kafka/message")
	if a, err := ParseArrival(&e); err != nil || a.Report != (Report{"Test", "GT", "Sunny"}) {
		t.Errorf("plain JSON in the topic is counted as %+v, %v", a, err)
	}
}

func TestMessage(t *testing.T) {
	for name, e := range ours(t) {
		t.Run(name, func(t *testing.T) {
			m := WriteMessage(&e)
			if !m.Header.Durable || *m.Properties.ContentType != "application/cloudevents+json" || len(m.ApplicationProperties) > 0 {
				t.Errorf("not durable and structured: %+v", m)
			}
			// Over the wire and back.
			encoded, err := m.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			m = new(amqp.Message)
			if err := m.UnmarshalBinary(encoded); err != nil {
				t.Fatal(err)
			}
			sdk, err := binding.ToEvent(context.Background(), ceamqp.NewMessage(m, nil))
			if err != nil {
				t.Fatal(err)
			}
			if got, want := describe(sdk), describe(&e); !equal(got, want) {
				t.Errorf("the SDK reads %v\nwant %v", got, want)
			}
			if got := ReadMessage(m, "/foreign"); !equal(describe(&got), describe(&e)) {
				t.Errorf("read as %s", got)
			}
		})
	}
}

func TestForeignMessages(t *testing.T) {
	text := func(s string) *string { return &s }
	binary := map[string]any{"cloudEvents:specversion": "1.0", "cloudEvents:id": "a", "cloudEvents:source": "/app", "cloudEvents:type": Type}
	const place = "/rabbitmq/message"
	for _, c := range []struct {
		name    string
		message amqp.Message
		want    string // source and id; "" for a new id each time
		counted bool
	}{
		{"binary", amqp.Message{ApplicationProperties: binary, Data: [][]byte{[]byte(gt)}}, "/app a", true},
		{"binary, the data in two sections", amqp.Message{ApplicationProperties: binary, Data: [][]byte{[]byte(gt[:9]), []byte(gt[9:])}}, "/app a", true},
		{"binary, the data as a value", amqp.Message{ApplicationProperties: binary, Value: gt}, "/app a", true},
		{"binary, a content type", amqp.Message{Properties: &amqp.MessageProperties{ContentType: text("application/json")}, ApplicationProperties: binary, Data: [][]byte{[]byte(gt)}}, "/app a", true},
		{"binary, but without an id", amqp.Message{
			Properties:            &amqp.MessageProperties{MessageID: "m"},
			ApplicationProperties: map[string]any{"cloudEvents:specversion": "1.0", "cloudEvents:source": "/app", "cloudEvents:type": Type}, Data: [][]byte{[]byte(gt)},
		}, place + " m", true},
		{"binary, but the version is a number", amqp.Message{
			Properties:            &amqp.MessageProperties{MessageID: "m"},
			ApplicationProperties: map[string]any{"cloudEvents:specversion": 1}, Data: [][]byte{[]byte(gt)},
		}, place + " m", true},
		{"structured", amqp.Message{Properties: &amqp.MessageProperties{ContentType: text("application/cloudevents+json")}, Data: [][]byte{[]byte(envelopeGT)}}, "/app a", true},
		{"structured, with a charset", amqp.Message{Properties: &amqp.MessageProperties{ContentType: text("application/cloudevents+json; charset=utf-8")}, Data: [][]byte{[]byte(envelopeGT)}}, "/app a", true},
		{"structured, but broken", amqp.Message{Properties: &amqp.MessageProperties{ContentType: text("application/cloudevents+json"), MessageID: "m"}, Data: [][]byte{[]byte(envelopeGT[1:])}}, place + " m", false},
		{"plain, a message-id", amqp.Message{Properties: &amqp.MessageProperties{MessageID: "m"}, Data: [][]byte{[]byte(gt)}}, place + " m", true},
		{"plain, a message-id that is a number", amqp.Message{Properties: &amqp.MessageProperties{MessageID: uint64(7)}, Data: [][]byte{[]byte(gt)}}, place + " 7", true},
		{"plain, a message-id that is bytes", amqp.Message{Properties: &amqp.MessageProperties{MessageID: []byte{1, 0xff}}, Data: [][]byte{[]byte(gt)}}, place + " 01ff", true},
		{"plain, a message-id that is a UUID", amqp.Message{Properties: &amqp.MessageProperties{MessageID: amqp.UUID{1}}, Data: [][]byte{[]byte(gt)}}, place + " 01000000-0000-0000-0000-000000000000", true},
		{"plain, an empty message-id", amqp.Message{Properties: &amqp.MessageProperties{MessageID: ""}, Data: [][]byte{[]byte(gt)}}, "", true},
		{"plain, a message-id of spaces", amqp.Message{Properties: &amqp.MessageProperties{MessageID: "  "}, Data: [][]byte{[]byte(gt)}}, "", true},
		{"plain, no properties", amqp.Message{Data: [][]byte{[]byte(gt)}}, "", true},
		{"plain, a string value", amqp.Message{Properties: &amqp.MessageProperties{MessageID: "m"}, Value: gt}, place + " m", true},
		{"plain, a bytes value", amqp.Message{Properties: &amqp.MessageProperties{MessageID: "m"}, Value: []byte(gt)}, place + " m", true},
		{"plain, two sections", amqp.Message{Properties: &amqp.MessageProperties{MessageID: "m"}, Data: [][]byte{[]byte(gt[:5]), []byte(gt[5:])}}, place + " m", true},
		{"plain, a map", amqp.Message{Properties: &amqp.MessageProperties{MessageID: "m"}, Value: map[string]any{"country": "GT"}}, place + " m", false},
		{"empty", amqp.Message{}, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, again := ReadMessage(&c.message, place), ReadMessage(&c.message, place)
			if err := e.Validate(); err != nil {
				t.Fatal(err)
			}
			if c.want == "" {
				if e.ID() == again.ID() || e.Source() != place {
					t.Errorf("got %s, then %s", e, again)
				}
			} else if got := e.Source() + " " + e.ID(); got != c.want || again.ID() != e.ID() {
				t.Errorf("the identity is %s, want %s", got, c.want)
			}
			a, err := ParseArrival(&e)
			if (err == nil) != c.counted || c.counted && a.Report.Country != "GT" {
				t.Errorf("counted as %+v, %v", a, err)
			}
		})
	}
}

// FuzzMessage: bytes as they come over the wire never make it panic, and always become one valid event.
func FuzzMessage(f *testing.F) {
	for _, e := range ours(f) {
		if encoded, err := WriteMessage(&e).MarshalBinary(); err == nil {
			f.Add(encoded)
		}
	}
	for _, c := range []amqp.Message{
		{ApplicationProperties: map[string]any{"cloudEvents:specversion": "1.0", "cloudEvents:id": "a", "cloudEvents:source": "/", "cloudEvents:type": Type}, Data: [][]byte{[]byte(gt)}},
		{Properties: &amqp.MessageProperties{MessageID: uint64(7)}, Value: gt},
	} {
		if encoded, err := c.MarshalBinary(); err == nil {
			f.Add(encoded)
		}
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		m := new(amqp.Message)
		if m.UnmarshalBinary(wire) != nil {
			return
		}
		e := ReadMessage(m, "/rabbitmq/message")
		if err := e.Validate(); err != nil {
			t.Fatalf("not valid: %v\n%s", err, e)
		}
	})
}

// FuzzRecord: no record makes it panic; each becomes one valid event, the same each time that it is read.
func FuzzRecord(f *testing.F) {
	for _, c := range recordCases {
		if h := c.record.Headers; len(h) > 3 {
			f.Add(c.record.Value, string(h[1].Key), h[1].Value, string(h[2].Key), h[2].Value, string(h[len(h)-1].Key), h[len(h)-1].Value)
		} else {
			f.Add(c.record.Value, "content-type", []byte("application/cloudevents+json"), "", []byte{}, "", []byte{})
		}
	}
	f.Fuzz(func(t *testing.T, value []byte, k1 string, v1 []byte, k2 string, v2 []byte, k3 string, v3 []byte) {
		record := &sarama.ConsumerMessage{Partition: 3, Offset: 7, Value: value}
		record.Headers = records(k1, string(v1), k2, string(v2), k3, string(v3), "ce_specversion", "1.0", "ce_type", Type)
		e := ReadRecord(record, "/kafka/message")
		if err := e.Validate(); err != nil {
			t.Fatalf("not valid: %v\n%s", err, e)
		}
		if again := ReadRecord(record, "/kafka/message"); e.ID() != again.ID() || e.Source() != again.Source() {
			t.Errorf("read twice it is two events")
		}
	})
}
