package events

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"github.com/IBM/sarama"
	kafka "github.com/cloudevents/sdk-go/protocol/kafka_sarama/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
)

// WriteRecord makes the Kafka record of an event: CloudEvents' binary mode, with the event's id as key.
func WriteRecord(e *event.Event, topic string) (*sarama.ProducerMessage, error) {
	record := &sarama.ProducerMessage{Topic: topic}
	ctx := kafka.WithSkipKeyMapping(context.Background())
	if err := kafka.WriteProducerMessage(ctx, (*binding.EventMessage)(e), record); err != nil {
		return nil, fmt.Errorf("write event %q as a Kafka record: %w", e.ID(), err)
	}
	record.Key = sarama.StringEncoder(e.ID())
	return record, nil
}

// ReadRecord reads the event of a Kafka record in binary or structured mode. A record that is no valid CloudEvent
// becomes one, of type Type, whose data is the record's value and whose identity is where it stands: source and the
// id partition:P/offset:O, which is how Knative's KafkaSource names them.
func ReadRecord(record *sarama.ConsumerMessage, source string) event.Event {
	message := kafka.NewMessageFromConsumerMessage(record)
	switch message.ReadEncoding() {
	case binding.EncodingStructured:
		if e, err := Parse(record.Value); err == nil && e.Validate() == nil {
			return e
		}
	case binding.EncodingBinary:
		// The SDK adds where the record stood as extensions, in the name space of the sender's own.
		for _, added := range []string{"ce_kafkaoffset", "ce_kafkapartition", "ce_kafkatopic"} {
			delete(message.Headers, added)
		}
		if e, err := binding.ToEvent(context.Background(), message); err == nil && e.Validate() == nil {
			return *e
		}
	}
	id := fmt.Sprintf("partition:%d/offset:%d", record.Partition, record.Offset)
	return foreign(source, id, record.Value)
}

// foreign wraps a message that is no CloudEvent.
func foreign(source, id string, data []byte) event.Event {
	u, err := url.Parse(source)
	if err != nil || source == "" {
		u = &url.URL{Path: strings.ToValidUTF8(source, "")}
	}
	return event.Event{
		Context:     &event.EventContextV1{ID: id, Source: types.URIRef{URL: *u}, Type: Type},
		DataEncoded: data,
	}
}
