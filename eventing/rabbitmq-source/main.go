// Rabbitmq-source delivers the events of a RabbitMQ queue to a sink.
package main

import (
	"isobar.dev/eventing/source"
	"isobar.dev/internal/serve"
)

type settings struct {
	source.Settings
	source.RabbitSettings
}

func main() {
	serve.Main("rabbitmq-source", source.Program(func(s settings) (source.Settings, source.Source, error) {
		src, err := source.NewRabbit(s.RabbitSettings)
		return s.Settings, src, err
	}))
}
