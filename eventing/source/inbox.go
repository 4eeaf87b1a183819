package source

import (
	"context"
	"sync"
)

// inbox holds what has arrived and has not been taken. Several may put, and several take.
type inbox struct {
	mu      sync.Mutex
	waiting []Event
	bytes   int
	least   int           // what the most modest of those who wait to take waits for
	arrived chan struct{} // closed when that has arrived; nil while nobody waits for it
	taken   chan struct{} // closed when something is taken; nil while nobody waits for that
}

// Within these limits put does not wait.
const (
	inboxMost  = 2000
	inboxBytes = 4 * MostBytes
)

// together is how many events, if they have arrived together, are put at a time.
const together = 128

func newInbox() *inbox { return new(inbox) }

// put adds events. If there are too many it waits, unless done is closed before.
func (b *inbox) put(done <-chan struct{}, events ...Event) {
	b.mu.Lock()
	for len(b.waiting) > inboxMost || b.bytes > inboxBytes {
		if b.taken == nil {
			b.taken = make(chan struct{})
		}
		taken := b.taken
		b.mu.Unlock()
		select {
		case <-taken:
		case <-done:
			return
		}
		b.mu.Lock()
	}
	b.add(events)
	b.mu.Unlock()
}

// force adds events without a limit: another one holds for them.
func (b *inbox) force(events ...Event) {
	b.mu.Lock()
	b.add(events)
	b.mu.Unlock()
}

func (b *inbox) add(events []Event) {
	for _, e := range events {
		b.bytes += len(e.JSON)
	}
	b.waiting = append(b.waiting, events...)
	if b.arrived != nil && b.has(b.least) {
		close(b.arrived)
		b.arrived = nil
	}
}

// has reports whether so many wait, or as much as a batch may hold.
func (b *inbox) has(least int) bool {
	return len(b.waiting) >= least || b.bytes >= MostBytes
}

// take is Source's Take.
func (b *inbox) take(ctx context.Context, least, most int) []Event {
	for ctx.Err() == nil {
		b.mu.Lock()
		if b.has(least) {
			batch := b.batch(most)
			b.mu.Unlock()
			if len(batch) > 0 {
				return batch
			}
			continue
		}
		if b.arrived == nil {
			b.arrived, b.least = make(chan struct{}), least
		}
		b.least = min(b.least, least)
		arrived := b.arrived
		b.mu.Unlock()
		select {
		case <-arrived:
		case <-ctx.Done():
		}
	}
	return nil
}

func (b *inbox) batch(most int) []Event {
	batch := make([]Event, 0, min(len(b.waiting), most))
	size, n := 0, 0
	for ; n < len(b.waiting) && len(batch) < most; n++ {
		e := b.waiting[n]
		if len(batch) > 0 && size+len(e.JSON) > MostBytes {
			break
		}
		b.bytes -= len(e.JSON)
		if e.from.takes(e.at) {
			size += len(e.JSON)
			batch = append(batch, e)
		}
	}
	left := copy(b.waiting, b.waiting[n:])
	clear(b.waiting[left:])
	b.waiting = b.waiting[:left]
	if b.taken != nil {
		close(b.taken)
		b.taken = nil
	}
	return batch
}
