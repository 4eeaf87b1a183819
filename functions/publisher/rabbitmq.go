package main

import (
	"context"

	amqp "github.com/Azure/go-amqp"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events"
	"isobar.dev/internal/rabbit"
)

// rabbitMQ is the Broker that is a queue of RabbitMQ. A quorum queue confirms what a majority of its members have on
// disk.
type rabbitMQ struct{ *rabbit.Sender }

var _ Broker = rabbitMQ{}

// newRabbitMQ checks the settings; its error names the variable that is wrong.
func newRabbitMQ(s rabbit.Settings, queue string) (rabbitMQ, error) {
	if err := s.Check(); err != nil {
		return rabbitMQ{}, err
	}
	return rabbitMQ{rabbit.NewSender(s, queue)}, nil
}

func (b rabbitMQ) Publish(ctx context.Context, reports []event.Event) error {
	messages := make([]*amqp.Message, len(reports))
	for i := range reports {
		messages[i] = events.WriteMessage(&reports[i])
	}
	return b.Send(ctx, messages...)
}
