package knative

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// post posts to the route and returns the status and what was said.
func post(ctx context.Context, address, body string, header ...string) (int, string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, "", err
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := client.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	return answer.StatusCode, string(said), err
}

// report posts one report, which must be accepted.
func report(t *testing.T, address string) {
	t.Helper()
	status, said, err := post(t.Context(), address, `{"description":"Test","country":"GT","weather":"Sunny"}`)
	if err != nil || status != http.StatusAccepted {
		t.Fatalf("a report is answered %d %s %v", status, said, err)
	}
}

// load is many clients that send reports, and each again under the same id until it is accepted.
type load struct {
	address string
	name    string // of the CloudEvents source
	total   int64
	pause   time.Duration // of a client for each report that was accepted

	next, accepted atomic.Int64
	resent         atomic.Int64
	sending        sync.WaitGroup
	failed         chan error
	mu             sync.Mutex
	want           counts
}

const clients = 30

// begins begins to send the reports, at most so many a second.
func begins(ctx context.Context, address string, total, rate int) *load {
	l := &load{
		pause:   clients * time.Second / time.Duration(rate),
		address: address + "/reports", name: fmt.Sprintf("/e2e/%d", time.Now().UnixNano()), total: int64(total),
		failed: make(chan error, clients), want: counts{countries: map[string]int{}},
	}
	for range clients {
		l.sending.Go(func() {
			if err := l.client(ctx); err != nil {
				l.failed <- err
			}
		})
	}
	return l
}

func (l *load) client(ctx context.Context) error {
	for {
		first := l.next.Load()
		size := int64(1)
		if rand.IntN(3) == 0 {
			size = 1 + rand.Int64N(50)
		}
		size = min(size, l.total-first)
		switch {
		case size <= 0:
			return nil
		case !l.next.CompareAndSwap(first, first+size):
			continue
		}
		body, countries := l.batch(first, size)
		if err := l.insist(ctx, body); err != nil {
			return fmt.Errorf("reports %d to %d: %w", first, first+size, err)
		}
		l.accepted.Add(size)
		l.mu.Lock()
		l.want.total += int(size)
		for _, c := range countries {
			l.want.countries[c]++
		}
		l.mu.Unlock()
		select {
		case <-time.After(time.Duration(size) * l.pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *load) batch(first, size int64) (body string, countries []string) {
	var events []string
	for i := range size {
		country := []string{"GT", "ESP", "ES", "DE", "FRA", "JP", "US", "BRA"}[rand.IntN(8)]
		countries = append(countries, country)
		events = append(events, fmt.Sprintf(`{"specversion":"1.0","type":"dev.isobar.weather.report.v1","source":"%s","id":"%d",`+
			`"data":{"country":"%s","weather":"Rain"}}`, l.name, first+i, country))
	}
	return "[" + strings.Join(events, ",") + "]", countries
}

// insist sends until it is accepted. A 404 passes too: a gateway may say so while a route changes.
func (l *load) insist(ctx context.Context, body string) error {
	for {
		status, said, err := post(ctx, l.address, body, "Content-Type", "application/cloudevents-batch+json")
		if err == nil && status == http.StatusAccepted {
			return nil
		}
		if err == nil && status < 500 && status != http.StatusTooManyRequests && status != http.StatusNotFound {
			return fmt.Errorf("%d %s", status, said)
		}
		l.resent.Add(1)
		select {
		case <-ctx.Done():
			return fmt.Errorf("last: %d %s %w", status, said, errors.Join(err, ctx.Err()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// await waits until so many are accepted.
func (l *load) await(t *testing.T, accepted int64) {
	t.Helper()
	until(t, 5*time.Minute, func(context.Context) error {
		if n := l.accepted.Load(); n < min(accepted, l.total) {
			return fmt.Errorf("%d of %d reports are accepted", n, accepted)
		}
		return nil
	})
}

// end waits until all are accepted, and returns what both stores must say then.
func (l *load) end(t *testing.T) counts {
	t.Helper()
	l.sending.Wait()
	close(l.failed)
	for err := range l.failed {
		t.Fatal(err)
	}
	if l.want.total != int(l.total) {
		t.Fatalf("%d were sent, not %d", l.want.total, l.total)
	}
	return l.want
}
