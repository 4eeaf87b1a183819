package events

import (
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"
)

// ReadLetters reads what is posted to a dead letter sink, one event in binary or structured mode or a batch of any length,
// and returns the records that keep it, in binary mode. Its errors are ReadRequest's.
//
// In HTTP's binary mode, which is that of Knative's sources, an event needs no more than a specversion, an id, a source and
// a type: whatever stands there is kept as it is, be it too long or no timestamp. That may be the very reason why it is
// dead.
func ReadLetters(h http.Header, body []byte, topic string) ([]*sarama.ProducerMessage, error) {
	if h.Get("Ce-Specversion") != "" { // whatever the content type: Knative wraps CloudEvents that are broken, too
		return letter(h, body, topic)
	}
	how, err := requestMode(h)
	if err != nil {
		return nil, err
	}
	var all []event.Event
	switch how {
	case structured:
		all = make([]event.Event, 1)
		all[0], err = Parse(body)
	case batch:
		all, err = ParseBatch(body)
	default:
		err = &UnsupportedMediaType{h.Get("Content-Type") + " without a ce-specversion"}
	}
	if err != nil {
		return nil, err
	}
	return WriteRecords(all, topic)
}

// letter makes the record of an event of which the attributes are HTTP headers.
func letter(h http.Header, body []byte, topic string) ([]*sarama.ProducerMessage, error) {
	for _, name := range []string{"ce-id", "ce-source", "ce-type"} {
		if h.Get(name) == "" {
			return nil, &Malformed{"CloudEvent", name + " is missing"}
		}
	}
	record := &sarama.ProducerMessage{Topic: topic, Key: sarama.StringEncoder(attribute(h["Ce-Id"])), Value: sarama.ByteEncoder(body)}
	for name, values := range h {
		name = strings.ToLower(name)
		if of, is := strings.CutPrefix(name, "ce-"); is {
			record.Headers = append(record.Headers, sarama.RecordHeader{Key: []byte("ce_" + of), Value: []byte(attribute(values))})
		}
	}
	if mediaType := h.Get("Content-Type"); mediaType != "" {
		record.Headers = append(record.Headers, contentTypeHeader(mediaType))
	}
	return []*sarama.ProducerMessage{record}, nil
}

// attribute returns the value of a header that Knative has written.
func attribute(values []string) string { return literal(strings.Join(values, ", ")) }

// literal is what a header's value says when Knative has written it. Knative's sources do not percent-encode it, as the
// specification would have it, so a percent sign is one. Other characters than ASCII are in ISO 8859-1 if Java has written
// them.
func literal(text string) string {
	if utf8.ValidString(text) {
		return text
	}
	runes := make([]rune, len(text))
	for i := range runes {
		runes[i] = rune(text[i])
	}
	return string(runes)
}
