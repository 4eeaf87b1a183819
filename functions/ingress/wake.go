package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"
)

const (
	// quiet is after how long without a report the services further on may have no pods. It is shorter than the window
	// after which Knative takes the last one away.
	quiet = 15 * time.Second
	// wakeTimeout bounds a request that wakes a service: by then it is awake, or waking it does not help.
	wakeTimeout = 10 * time.Second
)

// waker asks services that scale to zero whether they are well, when a report comes after a quiet time: they start while
// it is on its way, all at once instead of each when it arrives there. Nothing depends on the answer. The zero value
// wakes nobody. Its methods may be called at the same time.
type waker struct {
	urls   []string
	client http.Client

	mu      sync.Mutex
	last    time.Time // of a report
	asking  sync.WaitGroup
	stopped bool
}

// newWaker checks the URLs; its error names the variable.
func newWaker(urls []string) (*waker, error) {
	for _, text := range urls {
		if u, err := url.Parse(text); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("WAKE_URLS must be http or https URLs, separated by commas; %q is none", text)
		}
	}
	return &waker{urls: urls, client: http.Client{Timeout: wakeTimeout}}, nil
}

// report hears of each report. It does not wait.
func (w *waker) report() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	wake := now.Sub(w.last) > quiet && !w.stopped
	w.last = now
	if !wake {
		return
	}
	for _, u := range w.urls {
		w.asking.Go(func() { w.ask(u) })
	}
}

func (w *waker) ask(u string) {
	r, err := http.NewRequestWithContext(context.Background(), http.MethodGet, u, nil)
	if err != nil {
		return // newWaker has parsed it
	}
	answer, err := w.client.Do(r)
	if err != nil {
		slog.Debug("not woken", "url", u, "error", err)
		return
	}
	answer.Body.Close()
}

// close waits for the requests under way.
func (w *waker) close() {
	w.mu.Lock()
	w.stopped = true
	w.mu.Unlock()
	w.asking.Wait()
}
