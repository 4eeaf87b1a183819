package peer

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestKeep(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	says := func(t *testing.T, text string, times int) {
		t.Helper()
		if n := strings.Count(log.String(), text); n != times {
			t.Errorf("%q is said %d times, not %d:\n%s", text, n, times, &log)
		}
	}

	t.Run("it waits longer each time, a second and a half at most, and says once that the peer is away", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			log.Reset()
			ctx, cancel := context.WithCancel(t.Context())
			var calls []time.Time
			Keep(ctx, "the peer", func(context.Context, func()) error {
				if calls = append(calls, time.Now()); len(calls) == 20 {
					cancel()
				}
				return errors.New("no route")
			})
			for i := 1; i < len(calls); i++ {
				backoff := min(minBackoff<<(i-1), maxBackoff)
				if waited := calls[i].Sub(calls[i-1]); waited < backoff/2 || waited > backoff*3/2 {
					t.Errorf("wait %d is %v, where %v is the backoff", i, waited, backoff)
				}
			}
			says(t, `msg="is away`, 1)
			says(t, "no route", 1)
			says(t, `msg="is back"`, 0)
		})
	})
	t.Run("it says that the peer is back, and begins with a short wait again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			log.Reset()
			ctx, cancel := context.WithCancel(t.Context())
			var calls int
			var broke time.Time
			Keep(ctx, "the peer", func(_ context.Context, up func()) error {
				switch calls++; calls {
				case 8:
					up()
					broke = time.Now()
				case 9:
					if waited := time.Since(broke); waited > minBackoff*3/2 {
						t.Errorf("after it worked the wait is %v", waited)
					}
					up()
					cancel()
				}
				return errors.New("broken")
			})
			says(t, `msg="is away`, 2)
			says(t, `msg="is back"`, 2)
		})
	})
	t.Run("it ends at once while it waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			start := time.Now()
			Keep(ctx, "the peer", func(context.Context, func()) error { return errors.New("no") })
			if took := time.Since(start); took != time.Millisecond {
				t.Errorf("it took %v", took)
			}
		})
	})
}
