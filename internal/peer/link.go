package peer

import (
	"context"
	"errors"
	"sync"
)

// ErrConnecting is the error of a Link of which no attempt to connect has ended yet.
var ErrConnecting = errors.New("not connected yet")

// Link is a connection of type T to a peer, made again whenever it breaks. Its methods may be called at the same time.
type Link[T any] struct {
	stop    context.CancelFunc
	stopped chan struct{}
	tried   chan struct{} // closed once the first attempt has an outcome

	mu      sync.Mutex
	current T
	err     error // why there is no connection; nil while there is one
}

// NewLink returns a Link that connects by itself until Close. It calls use again and again, as Keep does: use calls up
// with the connection as soon as that works, and returns with an error when it is of no more use, or when its context
// ends. After that nobody gets the connection any more.
func NewLink[T any](what string, use func(ctx context.Context, up func(T)) error) *Link[T] {
	ctx, stop := context.WithCancel(context.Background())
	l := &Link[T]{
		stop:    stop,
		stopped: make(chan struct{}),
		tried:   make(chan struct{}),
		err:     ErrConnecting,
	}
	var first sync.Once
	set := func(connection T, err error) {
		l.mu.Lock()
		l.current, l.err = connection, err
		l.mu.Unlock()
		first.Do(func() { close(l.tried) })
	}
	go func() {
		defer close(l.stopped)
		Keep(ctx, what, func(ctx context.Context, up func()) error {
			err := use(ctx, func(connection T) {
				set(connection, nil)
				up()
			})
			if err == nil {
				err = errors.New("closed")
			}
			var none T
			set(none, err)
			return err
		})
	}()
	return l
}

// Get returns the connection, or why there is none. It waits for nothing but the first attempt's outcome: who has just
// started does not know yet.
func (l *Link[T]) Get(ctx context.Context) (T, error) {
	select {
	case <-l.tried:
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current, l.err
}

// Err returns nil while there is a connection, or why there is none. It does not wait.
func (l *Link[T]) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// State says in a few words, for /readyz, what Err returns.
func State(err error) string {
	if err != nil {
		return "away: " + err.Error()
	}
	return "connected"
}

// Close ends the connection and waits until use has returned.
func (l *Link[T]) Close() {
	l.stop()
	<-l.stopped
}
