package events

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"strings"

	amqp "github.com/Azure/go-amqp"
	ceamqp "github.com/cloudevents/sdk-go/protocol/amqp/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
)

// WriteMessage makes the durable AMQP message of an event: CloudEvents' structured mode, which is the one that
// Knative's RabbitmqSource recognises.
func WriteMessage(e *event.Event) *amqp.Message {
	contentType := structuredMediaType
	return &amqp.Message{
		Header:     &amqp.MessageHeader{Durable: true},
		Properties: &amqp.MessageProperties{ContentType: &contentType},
		Data:       [][]byte{AppendJSON(make([]byte, 0, 320+len(e.DataEncoded)), e)},
	}
}

// ReadMessage reads the event of an AMQP message in structured or binary mode. A message that is no valid CloudEvent
// becomes one, of type Type, whose data is the message's body and whose identity is source and the message-id. One
// without a message-id gets a new id each time that it is read: it cannot be told from its own redelivery.
func ReadMessage(m *amqp.Message, source string) event.Event {
	message := ceamqp.NewMessage(m, nil)
	switch message.ReadEncoding() {
	case binding.EncodingStructured:
		if e, err := Parse(body(m)); err == nil && e.Validate() == nil {
			return e
		}
	case binding.EncodingBinary:
		if e, err := binding.ToEvent(context.Background(), message); err == nil && e.Validate() == nil {
			e.DataEncoded = body(m) // the SDK reads the first data section only
			return *e
		}
	}
	return foreign(source, messageID(m), body(m))
}

func messageID(m *amqp.Message) string {
	if m.Properties != nil {
		switch id := m.Properties.MessageID.(type) {
		case nil:
		case string:
			if strings.TrimSpace(id) != "" {
				return id
			}
		case []byte:
			if len(id) > 0 {
				return hex.EncodeToString(id)
			}
		default: // a uint64 or a UUID
			return fmt.Sprint(id)
		}
	}
	return newID()
}

func body(m *amqp.Message) []byte {
	switch value := m.Value.(type) {
	case string:
		return []byte(value)
	case []byte:
		return value
	}
	if len(m.Data) == 1 {
		return m.Data[0]
	}
	return bytes.Join(m.Data, nil)
}
