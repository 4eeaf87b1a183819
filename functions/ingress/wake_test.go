package main

import (
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// asked is a transport that hears which URLs are asked for.
type asked struct {
	mu   sync.Mutex
	urls []string
}

func (a *asked) RoundTrip(r *http.Request) (*http.Response, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.urls = append(a.urls, r.URL.String())
	return &http.Response{StatusCode: http.StatusServiceUnavailable, Body: http.NoBody}, nil
}

func TestWaker(t *testing.T) {
	urls := []string{"http://redis-writer/health", "http://valkey-writer/health"}
	for _, c := range []struct {
		name   string
		pauses []time.Duration // before each report
		wakes  int
	}{
		{"the first report wakes every service", []time.Duration{0}, 1},
		{"those that follow wake nobody", []time.Duration{0, time.Millisecond, quiet, quiet}, 1},
		{"the first after a quiet time does again", []time.Duration{0, quiet + 1, 0}, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, err := newWaker(urls)
				if err != nil {
					t.Fatal(err)
				}
				heard := new(asked)
				w.client.Transport = heard
				for _, pause := range c.pauses {
					time.Sleep(pause)
					w.report()
				}
				w.close()
				if got := strings.Join(heard.urls, " "); len(heard.urls) != c.wakes*len(urls) || !strings.Contains(got, urls[0]) || !strings.Contains(got, urls[1]) {
					t.Errorf("it asked %s", got)
				}
				time.Sleep(2 * quiet)
				w.report()
				synctest.Wait()
				if len(heard.urls) != c.wakes*len(urls) {
					t.Error("after close it wakes")
				}
			})
		})
	}
	for _, wrong := range []string{"redis-writer", "redis-writer:80", "ftp://redis-writer", ""} {
		if _, err := newWaker([]string{wrong}); err == nil || !strings.Contains(err.Error(), "WAKE_URLS") {
			t.Errorf("%q: %v", wrong, err)
		}
	}
}
