// Publisher puts weather reports on Kafka and on RabbitMQ, and answers when both have confirmed them.
package main

import (
	"context"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"isobar.dev/events/api"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/rabbit"
	"isobar.dev/internal/serve"
	publisherv1 "isobar.dev/proto/isobar/publisher/v1"
)

type settings struct {
	Host     string `env:"HOST"`                         // the address to listen on; all of them if empty
	Port     string `env:"PORT"`                         // one port for gRPC and REST, as Knative gives it
	GRPCPort string `env:"GRPC_PORT" envDefault:"50051"` // without PORT
	RESTPort string `env:"REST_PORT" envDefault:"8081"`  // without PORT
	Topic    string `env:"KAFKA_TOPIC" envDefault:"message"`
	Queue    string `env:"RABBITMQ_QUEUE" envDefault:"message"`
	Kafka    kafka.Settings
	RabbitMQ rabbit.Settings
}

func main() { serve.Main("publisher", build) }

func build(_ context.Context, s settings) (*serve.Program, error) {
	rabbitMQ, err := newRabbitMQ(s.RabbitMQ, s.Queue)
	if err != nil {
		return nil, err
	}
	kafka, err := newKafka(s.Kafka, s.Topic)
	if err != nil {
		rabbitMQ.Close()
		return nil, err
	}
	brokers := every{"kafka": kafka, "rabbitmq": rabbitMQ}
	p := &publisher{brokers: brokers}
	server, rest := newServer(p), api.Handler(p.rest)
	listeners := []serve.Listener{
		{Addr: net.JoinHostPort(s.Host, s.GRPCPort), GRPC: server},
		{Addr: net.JoinHostPort(s.Host, s.RESTPort), HTTP: rest},
	}
	if s.Port != "" {
		listeners = []serve.Listener{{Addr: net.JoinHostPort(s.Host, s.Port), GRPC: server, HTTP: rest}}
	}
	return &serve.Program{Listeners: listeners, Close: brokers.Close, Peers: brokers.peers}, nil
}

// newServer returns the gRPC server with the service, health and reflection.
func newServer(p *publisher) *grpc.Server {
	server := grpc.NewServer(
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	publisherv1.RegisterPublisherServiceServer(server, p)
	states := health.NewServer()
	states.SetServingStatus(publisherv1.PublisherService_ServiceDesc.ServiceName, healthv1.HealthCheckResponse_SERVING)
	healthv1.RegisterHealthServer(server, states)
	reflection.Register(server)
	return server
}
