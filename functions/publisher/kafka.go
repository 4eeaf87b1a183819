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

func newKafka(s kafka.Settings, topic string) kafkaTopic {
	return kafkaTopic{kafka.NewSender(s, topic), topic}
}

func (k kafkaTopic) Publish(ctx context.Context, reports []event.Event) error {
	records, err := events.WriteRecords(reports, k.topic)
	if err != nil {
		return err
	}
	return k.Send(ctx, records...)
}
