package local

import (
	"context"
	"testing"
	"time"
)

// StartKafka starts a Kafka of the test's own, and kills it when the test ends.
func StartKafka(t testing.TB, options ...Option) *Process {
	t.Helper()
	return start(t, KafkaKind, Kafka, options)
}

// StartRabbitMQ starts a RabbitMQ of the test's own, and kills it when the test ends.
func StartRabbitMQ(t testing.TB, options ...Option) *Process {
	t.Helper()
	return start(t, RabbitMQKind, RabbitMQ, options)
}

// StartRedis starts a Redis of the test's own, and kills it when the test ends.
func StartRedis(t testing.TB, options ...Option) *Process {
	t.Helper()
	return start(t, RedisKind, Redis, options)
}

// StartValkey starts a Valkey of the test's own, and kills it when the test ends.
func StartValkey(t testing.TB, options ...Option) *Process {
	t.Helper()
	return start(t, ValkeyKind, Valkey, options)
}

// StartSentinel starts a Redis Sentinel that watches the master at addr under a name, and kills it when the test ends.
func StartSentinel(t testing.TB, name, addr string, options ...Option) *Process {
	t.Helper()
	return start(t, RedisKind, func(dir string, port int, options ...Option) *Process {
		return Sentinel(dir, port, name, addr, options...)
	}, options)
}

func start(t testing.TB, kind Kind, server func(dir string, port int, options ...Option) *Process, options []Option) *Process {
	t.Helper()
	if err := Install(t.Context(), t.Output(), kind); err != nil {
		t.Fatal(err)
	}
	p := server(t.TempDir(), 0, options...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last lines of %s:\n%s", p.Log(), Tail(p.Log(), 30))
		}
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return p
}
