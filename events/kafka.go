package events

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/IBM/sarama"
	kafka "github.com/cloudevents/sdk-go/protocol/kafka_sarama/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
)

// WriteRecord makes the Kafka record of an event: CloudEvents' binary mode, with the event's id as key. What every
// report has is written directly, to the record that the SDK writes; an event with anything else is left to the SDK.
func WriteRecord(e *event.Event, topic string) (*sarama.ProducerMessage, error) {
	record := &sarama.ProducerMessage{Topic: topic, Key: sarama.StringEncoder(e.ID())}
	if writeBinary(e, record) {
		return record, nil
	}
	ctx := kafka.WithSkipKeyMapping(context.Background())
	if err := kafka.WriteProducerMessage(ctx, (*binding.EventMessage)(e), record); err != nil {
		return nil, fmt.Errorf("write event %q as a Kafka record: %w", e.ID(), err)
	}
	for i, h := range record.Headers {
		if string(h.Key) == contentType {
			record.Headers[i] = contentTypeHeader(string(h.Value))
		}
	}
	return record, nil
}

// WriteRecords makes the records of several events.
func WriteRecords(events []event.Event, topic string) ([]*sarama.ProducerMessage, error) {
	records := make([]*sarama.ProducerMessage, len(events))
	for i := range events {
		record, err := WriteRecord(&events[i], topic)
		if err != nil {
			return nil, err
		}
		records[i] = record
	}
	return records, nil
}

const contentType = "content-type"

// contentTypeHeader is the header of the data's content type. For data that is a CloudEvent itself it is not the usual
// one, by which the record would be that event, but one that readers of binary mode know as well.
func contentTypeHeader(mediaType string) sarama.RecordHeader {
	key := contentType
	if strings.HasPrefix(strings.ToLower(mediaType), "application/cloudevents") {
		key = "ce_datacontenttype"
	}
	return sarama.RecordHeader{Key: []byte(key), Value: []byte(mediaType)}
}

// The headers of binary mode, shared by all records: nobody writes to them.
var (
	headerSpecVersion = sarama.RecordHeader{Key: []byte("ce_specversion"), Value: []byte("1.0")}
	headerType        = sarama.RecordHeader{Key: []byte("ce_type"), Value: []byte(Type)}
	headerSource      = sarama.RecordHeader{Key: []byte("ce_source"), Value: []byte(DefaultSource)}
	headerJSON        = sarama.RecordHeader{Key: []byte("content-type"), Value: []byte(jsonMediaType)}
	keyID             = []byte("ce_id")
	keySource         = []byte("ce_source")
	keySubject        = []byte("ce_subject")
	keyTime           = []byte("ce_time")
)

func writeBinary(e *event.Event, record *sarama.ProducerMessage) bool {
	ctx, ok := e.Context.(*event.EventContextV1)
	if !ok || ctx.Type != Type || ctx.DataContentType == nil || *ctx.DataContentType != jsonMediaType ||
		ctx.Subject == nil || ctx.Time == nil || ctx.DataSchema != nil {
		return false
	}
	headers := make([]sarama.RecordHeader, 0, 7+len(ctx.Extensions))
	source := headerSource
	if ctx.Source != defaultSource {
		source = sarama.RecordHeader{Key: keySource, Value: []byte(ctx.Source.String())}
	}
	headers = append(headers, headerSpecVersion, headerType, source, headerJSON,
		sarama.RecordHeader{Key: keyID, Value: []byte(ctx.ID)},
		sarama.RecordHeader{Key: keySubject, Value: []byte(*ctx.Subject)},
		sarama.RecordHeader{Key: keyTime, Value: ctx.Time.UTC().AppendFormat(make([]byte, 0, len(time.RFC3339Nano)), time.RFC3339Nano)},
	)
	for name, value := range ctx.Extensions {
		text, ok := value.(string)
		if !ok {
			return false
		}
		headers = append(headers, sarama.RecordHeader{Key: []byte("ce_" + name), Value: []byte(text)})
	}
	record.Headers, record.Value = headers, sarama.ByteEncoder(e.DataEncoded)
	return true
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
