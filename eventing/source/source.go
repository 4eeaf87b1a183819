// Package source takes events from a broker and delivers them to a sink, at least once: an event is settled with the
// broker only after the sink has taken it or the dead letters have it.
package source

import (
	"context"

	"github.com/cloudevents/sdk-go/v2/event"
)

// Source hands out the events of a broker and hears what became of them. Its methods may be called at the same time.
type Source interface {
	// Run receives until ctx ends. While the broker is away it waits for it, and says so in the log.
	Run(ctx context.Context)

	// Take waits until so many events have arrived, or MostBytes of them, and returns at most so many and about MostBytes.
	// It returns none only when ctx has ended. Nobody else is handed them while they are neither settled nor given back, which
	// happens when the broker takes them back or is away.
	Take(ctx context.Context, least, most int) []Event

	// Settle says that events returned by Take are done with: the broker is not to deliver them again. It may still do
	// so, when it can't be told.
	Settle(done []Event)

	// Bury stores events in the dead letters. It returns nil once the broker has confirmed all of them; otherwise some
	// may have been stored. ctx has a deadline.
	Bury(ctx context.Context, dead []event.Event) error

	// State says in a few words how the connection does.
	State() string

	// Close ends what Bury needs, after Run has returned.
	Close()
}

// notYet is the State of a Source whose first attempt to connect has not ended.
const notYet = "not connected yet"

// MostBytes is the limit of what Take returns, in bytes of JSON. A single event may have more.
const MostBytes = 1 << 20

// Event is one event on its way.
type Event struct {
	// JSON is the event as CloudEvents' JSON format has it: one element of a batch.
	JSON []byte
	// Unreadable says why the broker's message can't be read; JSON then wraps its bytes. Nobody can make anything of it,
	// so it goes to the dead letters.
	Unreadable error

	from stream
	at   int64
}

// stream is where events stand in a row: a partition while it is assigned, a link while it is open.
type stream interface {
	// takes reports whether the event may be handed out, and if so counts it as under way.
	takes(at int64) bool
	// settles hears that events are done with.
	settles(at []int64)
}

// settle tells each stream of its events.
func settle(done []Event) {
	var at []int64
	for i := 0; i < len(done); {
		from := done[i].from
		at = at[:0]
		for ; i < len(done) && done[i].from == from; i++ {
			at = append(at, done[i].at)
		}
		from.settles(at)
	}
}
