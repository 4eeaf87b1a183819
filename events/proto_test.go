package events

import (
	"context"
	"errors"
	"maps"
	"net/url"
	"testing"
	"time"

	"github.com/IBM/sarama"
	pbformat "github.com/cloudevents/sdk-go/binding/format/protobuf/v2"
	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	kafka "github.com/cloudevents/sdk-go/protocol/kafka_sarama/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"google.golang.org/protobuf/proto"
)

// shortcuts are events that take the short way and such that do not.
func shortcuts() map[string]event.Event {
	plain := func(change func(*event.EventContextV1)) event.Event {
		e := New(Report{"Test", "GT", "Sunny"}, "an-id", time.Date(2026, 11, 23, 1, 2, 3, 456_000_000, time.FixedZone("", 3600)))
		change(e.Context.(*event.EventContextV1))
		return e
	}
	return map[string]event.Event{
		"a plain report":   plain(func(*event.EventContextV1) {}),
		"a source":         plain(func(c *event.EventContextV1) { c.Source = mustParseURIRef("/a/station?x=%20#y") }),
		"a trace":          plain(func(c *event.EventContextV1) { c.Extensions = map[string]any{TraceParent: "00-x", TraceState: "a=b"} }),
		"a text extension": plain(func(c *event.EventContextV1) { c.Extensions = map[string]any{"sequence": "7"} }),
		"other extensions": plain(func(c *event.EventContextV1) { c.Extensions = map[string]any{"n": int32(7), "b": true} }),
		"a data schema": plain(func(c *event.EventContextV1) {
			c.DataSchema = &types.URI{URL: url.URL{Scheme: "https", Host: "x.test"}}
		}),
		"no time":           plain(func(c *event.EventContextV1) { c.Time = nil }),
		"no subject":        plain(func(c *event.EventContextV1) { c.Subject = nil }),
		"no content type":   plain(func(c *event.EventContextV1) { c.DataContentType = nil }),
		"another type":      plain(func(c *event.EventContextV1) { c.Type = "dev.isobar.other" }),
		"another data type": plain(func(c *event.EventContextV1) { x := "text/json"; c.DataContentType = &x }),
	}
}

func TestTheShortWaysLeadWhereTheSDKDoes(t *testing.T) {
	for name, e := range shortcuts() {
		t.Run(name, func(t *testing.T) {
			ours, err := ToProto(&e)
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := pbformat.ToProto(&e)
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(ours, theirs) {
				t.Errorf("protobuf: %v, the SDK's %v", ours, theirs)
			}
			read, err := FromProto(theirs)
			if err != nil {
				t.Fatal(err)
			}
			readByTheSDK, err := pbformat.FromProto(theirs)
			if err != nil {
				t.Fatal(err)
			}
			if read.String() != readByTheSDK.String() {
				t.Errorf("read as %s, by the SDK as %s", read, readByTheSDK)
			}

			record, err := WriteRecord(&e, "message")
			if err != nil {
				t.Fatal(err)
			}
			theirRecord := &sarama.ProducerMessage{}
			if err := kafka.WriteProducerMessage(context.Background(), (*binding.EventMessage)(&e), theirRecord); err != nil {
				t.Fatal(err)
			}
			if a, b := headers(record), headers(theirRecord); !maps.Equal(a, b) {
				t.Errorf("record: %v, the SDK's %v", a, b)
			}
			a, _ := record.Value.Encode()
			if b, _ := theirRecord.Value.Encode(); string(a) != string(b) {
				t.Errorf("record: %s, the SDK's %s", a, b)
			}
		})
	}
}

func headers(record *sarama.ProducerMessage) map[string]string {
	all := map[string]string{}
	for _, h := range record.Headers {
		all[string(h.Key)] = string(h.Value)
	}
	return all
}

func TestWhatIsNoCloudEventInProtobufIsMalformed(t *testing.T) {
	good, err := ToProto(new(shortcuts()["a plain report"]))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*pb.CloudEvent){
		"no id":                    func(m *pb.CloudEvent) { m.Id = "" },
		"no source":                func(m *pb.CloudEvent) { m.Source = "" },
		"no type":                  func(m *pb.CloudEvent) { m.Type = "" },
		"a source that is no URI":  func(m *pb.CloudEvent) { m.Source = "%zz" },
		"an attribute that is nil": func(m *pb.CloudEvent) { m.Attributes["x"] = nil },
		"an unset attribute":       func(m *pb.CloudEvent) { m.Attributes["x"] = &pb.CloudEventAttributeValue{} },
		"an unknown spec version":  func(m *pb.CloudEvent) { m.SpecVersion = "7" },
	} {
		t.Run(name, func(t *testing.T) {
			m := proto.Clone(good).(*pb.CloudEvent)
			change(m)
			e, err := FromProto(m)
			if _, malformed := errors.AsType[*Malformed](err); !malformed {
				t.Errorf("read as %s, %v", e, err)
			}
		})
	}
}
