package peer

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestLink(t *testing.T) {
	// step is what use does next: it connects as the number, breaks with the error.
	type step struct {
		connection int
		err        error
	}
	run := func(t *testing.T, test func(t *testing.T, l *Link[int], next chan step)) {
		synctest.Test(t, func(t *testing.T) {
			next := make(chan step)
			l := NewLink("the peer", func(ctx context.Context, up func(int)) error {
				for {
					select {
					case s := <-next:
						if s.err != nil {
							return s.err
						}
						up(s.connection)
					case <-ctx.Done():
						return ctx.Err()
					}
				}
			})
			test(t, l, next)
			l.Close()
			if _, err := l.Get(t.Context()); err == nil || l.Err() == nil {
				t.Error("after Close there is a connection")
			}
		})
	}
	errAway := errors.New("away")
	get := func(t *testing.T, l *Link[int], connection int, want error) {
		t.Helper()
		synctest.Wait()
		start := time.Now()
		if got, err := l.Get(t.Context()); got != connection || !errors.Is(err, want) || !errors.Is(l.Err(), want) {
			t.Errorf("got %d, %v", got, err)
		}
		if waited := time.Since(start); waited != 0 {
			t.Errorf("Get waited %v", waited)
		}
	}
	t.Run("the first outcome is waited for, as long as the context lasts", func(t *testing.T) {
		run(t, func(t *testing.T, l *Link[int], next chan step) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			if _, err := l.Get(ctx); !errors.Is(err, ErrConnecting) || time.Since(start) != time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			go func() { time.Sleep(time.Second); next <- step{connection: 7} }()
			if got, err := l.Get(t.Context()); got != 7 || err != nil {
				t.Errorf("got %d, %v", got, err)
			}
		})
	})
	t.Run("later nothing is waited for: there is one, or the reason why there is none", func(t *testing.T) {
		run(t, func(t *testing.T, l *Link[int], next chan step) {
			next <- step{err: errAway}
			get(t, l, 0, errAway)
			next <- step{connection: 1}
			get(t, l, 1, nil)
			next <- step{err: errAway}
			get(t, l, 0, errAway)
			next <- step{connection: 2}
			get(t, l, 2, nil)
		})
	})
}
