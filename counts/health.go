package counts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// health is how a store did when it was last asked.
type health struct {
	store string
	fell  chan struct{} // has one when the store has gone

	mu    sync.Mutex
	asked bool
	err   error
	since time.Time
}

func newHealth(store string) health {
	return health{store: store, fell: make(chan struct{}, 1)}
}

// note says in the log what has changed, and returns err.
func (h *health) note(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.err
	h.err = err
	switch {
	case err == nil && before == nil:
		if !h.asked {
			slog.Info("the store answers", "store", h.store)
		}
	case err == nil:
		slog.Info("the store counts again", "store", h.store, "after", time.Since(h.since).Round(time.Millisecond))
	case before == nil:
		h.since = time.Now()
		slog.Warn("the store does not count: waiting for it", "store", h.store, "error", err)
		select {
		case h.fell <- struct{}{}:
		default:
		}
	case lasting(err) && !lasting(before):
		slog.Error("the store can't count", "store", h.store, "error", err)
	}
	h.asked = true
	return err
}

// lasting tells whether an error will not pass by itself.
func lasting(err error) bool {
	f, ok := errors.AsType[*Failure](err)
	return ok && f.Lasting
}

// refuses tells whether the store answers but does not count: then only counting can tell whether that is over.
func (h *health) refuses() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, few := errors.AsType[*tooFewReplicas](h.err)
	_, reply := errors.AsType[redis.Error](h.err)
	return few || reply && !redis.IsLoadingError(h.err) && !redis.IsAuthError(h.err)
}

// Status implements Store.
func (s *server) Status() string {
	h := &s.health
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.err != nil:
		return fmt.Sprintf("does not count since %s: %v", h.since.UTC().Format(time.RFC3339), h.err)
	case h.asked:
		return "answers"
	}
	return "not asked yet"
}

// Watch implements Store.
func (s *server) Watch(ctx context.Context) {
	const shortest, longest, remind = 100 * time.Millisecond, 5 * time.Second, 30 * time.Second
	pause, reminded := shortest, time.Now()
	for ctx.Err() == nil {
		err := s.ping(ctx)
		if err == nil || s.health.refuses() {
			pause = shortest
			select {
			case <-s.health.fell:
				reminded = time.Now()
			case <-ctx.Done():
			}
			continue
		}
		if time.Since(reminded) > remind {
			slog.Warn("still waiting for the store", "store", s.name, "error", err)
			reminded = time.Now()
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, longest)
	}
}

// ping asks the store whether it is there.
func (s *server) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout+answerTimeout)
	defer cancel()
	err := s.client.Ping(ctx).Err()
	if redis.IsPermissionError(err) {
		err = nil // it answers
	}
	if err == nil && s.health.refuses() {
		return nil
	}
	return s.health.note(s.failure(err))
}
