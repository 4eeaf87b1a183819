// Kafka-source delivers the events of a Kafka topic to a sink.
package main

import (
	"isobar.dev/eventing/source"
	"isobar.dev/internal/serve"
)

type settings struct {
	source.Settings
	source.KafkaSettings
}

func main() {
	serve.Main("kafka-source", source.Program(func(s settings) (source.Settings, source.Source, error) {
		src, err := source.NewKafka(s.KafkaSettings)
		return s.Settings, src, err
	}))
}
