package main

import (
	"context"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events"
	"isobar.dev/internal/kafka"
)

// kafkaTopic is the Broker that is a topic of Kafka. It confirms what all in-sync replicas have.
type kafkaTopic struct {
	*kafka.Sender
	topic string
}

var _ Broker = kafkaTopic{}

// newKafka checks the settings; its error names the variable that is wrong.
func newKafka(s kafka.Settings, topic string) (kafkaTopic, error) {
	sender, err := kafka.NewSender(s, topic)
	return kafkaTopic{sender, topic}, err
}

func (k kafkaTopic) Publish(ctx context.Context, reports []event.Event) error {
	records, err := events.WriteRecords(reports, k.topic)
	if err != nil {
		return err
	}
	return k.Send(ctx, records...)
}
