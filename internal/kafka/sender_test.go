package kafka

import (
	"errors"
	"testing"

	"github.com/IBM/sarama"
	"github.com/IBM/sarama/mocks"
	kafkasender "github.com/cloudevents/sdk-go/protocol/kafka_sarama/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
)

// TestClosedClient: CloudEvents' sender takes a client that was closed under it for success; ours does not. What happens
// with a real broker is in the publisher's conformance suite: after Close nothing is confirmed.
func TestClosedClient(t *testing.T) {
	c := sarama.NewConfig()
	c.Producer.Return.Successes = true
	t.Run("the library's fault", func(t *testing.T) {
		e := event.New()
		e.SetID("1")
		e.SetSource("/app")
		e.SetType("t")
		closed := mocks.NewSyncProducer(t, c)
		closed.ExpectSendMessageAndFail(sarama.ErrClosedClient)
		sender, err := kafkasender.NewSenderFromSyncProducer("message", closed)
		if err != nil {
			t.Fatal(err)
		}
		if err := sender.Send(t.Context(), (*binding.EventMessage)(&e)); err != nil {
			t.Errorf("it says %v: it can be used now", err)
		}
	})
	t.Run("ours", func(t *testing.T) {
		closed := mocks.NewAsyncProducer(t, c)
		closed.ExpectInputAndFail(sarama.ErrClosedClient)
		p := &producer{AsyncProducer: closed, gone: make(chan struct{}), failed: make(chan error, 1)}
		results := p.collect()
		record, all := &sarama.ProducerMessage{Topic: "message"}, new(sent)
		record.Metadata = all
		if err := p.send(t.Context(), all, []*sarama.ProducerMessage{record}); !errors.Is(err, sarama.ErrClosedClient) {
			t.Errorf("it says %v", err)
		}
		if err := <-p.failed; !errors.Is(err, sarama.ErrClosedClient) {
			t.Errorf("the producer is given up for %v", err)
		}
		p.AsyncClose()
		<-results
	})
}
