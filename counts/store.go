// Package counts counts weather reports in a store, each exactly once, and takes them by HTTP.
//
// The counts are country:counts and weather:counts, two hashes with a field for every country code and every weather as
// it was sent, and messages:total, an integer. A weather is free text, so weather:counts grows with what is reported; it
// is neither folded nor cut, since then it would no longer say what was sent. The ids that are remembered are in
// messages:seen:1 and so on, and messages:seen:until is about these sets.
package counts

import (
	"context"

	"isobar.dev/events"
)

// Store counts reports and remembers their ids in one step. Its methods may be called at the same time.
type Store interface {
	// Count returns nil once the store has counted every report whose event it has not seen before, by source and id,
	// within its window, and remembers it: for the window at least and a quarter longer at most. An event that stands
	// twice among arrivals is one. Up to 10,000 arrivals are counted together, all of them or none.
	//
	// An error is a *Failure. What it was about may have been counted all the same, if only the answer was lost. To
	// count the same arrivals again is always safe.
	Count(ctx context.Context, arrivals []events.Arrival) error
	// Watch keeps asking a store that is away whether it is back, says in the log when it goes and when it comes, and
	// returns when ctx ends. To count does not depend on it.
	Watch(ctx context.Context)
	// Status tells in words how the store did when it was last asked. It does not wait.
	Status() string
	// Close closes the connections. Nothing may be counted afterwards.
	Close()
}

// Failure is why a store did not count, or did not say so.
type Failure struct {
	// Lasting means that it will not pass by itself: somebody has to change a setting or what is in the store.
	Lasting bool
	// Contents means that it is about what is in the store, so that other reports may do better.
	Contents bool
	// Advice says what to do about it, and may be empty.
	Advice string
	Err    error
}

func (f *Failure) Error() string {
	if f.Advice == "" {
		return f.Err.Error()
	}
	return f.Err.Error() + ": " + f.Advice
}

func (f *Failure) Unwrap() error { return f.Err }
