package main

import (
	"context"
	"errors"
	"sync"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/internal/peer"
)

// Broker stores events durably. Its methods may be called at the same time.
type Broker interface {
	// Publish returns nil when the broker has confirmed that it has every one of the events, as durable as it is set
	// up to be. Any error means that this is not certain of at least one of them; publishing the same events again is
	// right then. While the broker is known to be away it fails at once; the first connection after the start is waited for. ctx must have a deadline, which is kept.
	Publish(ctx context.Context, events []event.Event) error
	// Err tells why the broker is away, or nil. It does not wait.
	Err() error
	// Close gives up what is under way and frees everything.
	Close()
}

// brokerError says which broker an error is of.
type brokerError struct {
	broker string
	err    error
}

func (e *brokerError) Error() string { return e.broker + ": " + e.err.Error() }
func (e *brokerError) Unwrap() error { return e.err }

// every is the Broker that is several, by name: what it confirms, all of them have.
type every map[string]Broker

var _ Broker = every{}

// Publish publishes to all brokers at the same time and waits for each. It publishes to none while one is known to be
// away.
func (all every) Publish(ctx context.Context, events []event.Event) error {
	if err := all.Err(); err != nil && !errors.Is(err, peer.ErrConnecting) {
		return err
	}
	errs := make(chan error, len(all))
	for name, b := range all {
		go func() {
			err := b.Publish(ctx, events)
			if err != nil {
				err = &brokerError{name, err}
			}
			errs <- err
		}()
	}
	var joined []error
	for range all {
		joined = append(joined, <-errs)
	}
	return errors.Join(joined...)
}

func (all every) Err() error {
	var errs []error
	for name, b := range all {
		if err := b.Err(); err != nil {
			errs = append(errs, &brokerError{name, err})
		}
	}
	return errors.Join(errs...)
}

// Close closes all of them at the same time.
func (all every) Close() {
	var closing sync.WaitGroup
	for _, b := range all {
		closing.Go(b.Close)
	}
	closing.Wait()
}

// peers is what /readyz says of the brokers.
func (all every) peers() map[string]string {
	states := make(map[string]string, len(all))
	for name, b := range all {
		states[name] = peer.State(b.Err())
	}
	return states
}
