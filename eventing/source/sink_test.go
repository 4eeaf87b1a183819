package source

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"isobar.dev/events"
)

func TestSinkSettings(t *testing.T) {
	for name, c := range map[string]struct {
		settings SinkSettings
		wrong    string // the setting that the error names
	}{
		"http":                             {SinkSettings{Sink: "http://writer.default.svc.cluster.local"}, ""},
		"https with a path":                {SinkSettings{Sink: "https://broker/default/default"}, ""},
		"overrides":                        {SinkSettings{Sink: "http://a", Overrides: `{"extensions":{"a":"b"}}`}, ""},
		"overrides without extensions":     {SinkSettings{Sink: "http://a", Overrides: `{}`}, ""},
		"no scheme":                        {SinkSettings{Sink: "writer:8080"}, "K_SINK"},
		"no host":                          {SinkSettings{Sink: "http://"}, "K_SINK"},
		"another scheme":                   {SinkSettings{Sink: "ftp://a"}, "K_SINK"},
		"no URL":                           {SinkSettings{Sink: "http://[::1"}, "K_SINK"},
		"overrides that are no JSON":       {SinkSettings{Sink: "http://a", Overrides: `{`}, "K_CE_OVERRIDES"},
		"an override that is a number":     {SinkSettings{Sink: "http://a", Overrides: `{"extensions":{"a":1}}`}, "K_CE_OVERRIDES"},
		"an override with a bad name":      {SinkSettings{Sink: "http://a", Overrides: `{"extensions":{"a-b":"c"}}`}, "K_CE_OVERRIDES"},
		"an override of an attribute":      {SinkSettings{Sink: "http://a", Overrides: `{"extensions":{"id":"c"}}`}, "K_CE_OVERRIDES"},
		"an override of data":              {SinkSettings{Sink: "http://a", Overrides: `{"extensions":{"data":"c"}}`}, "K_CE_OVERRIDES"},
		"certificates that are none":       {SinkSettings{Sink: "https://a", CACerts: "x"}, "K_CA_CERTS"},
		"an override whose name is upcase": {SinkSettings{Sink: "http://a", Overrides: `{"extensions":{"A":"c"}}`}, "K_CE_OVERRIDES"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewSink(c.settings)
			if (err == nil) != (c.wrong == "") || err != nil && !strings.HasPrefix(err.Error(), c.wrong) {
				t.Errorf("got %v, want an error about %q", err, c.wrong)
			}
		})
	}
}

func TestSinkTrustsCACerts(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }))
	defer server.Close()
	certificate := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	for name, c := range map[string]struct {
		certificates string
		trusted      bool
	}{"given": {certificate, true}, "not given": {"", false}} {
		t.Run(name, func(t *testing.T) {
			sink, err := NewSink(SinkSettings{Sink: server.URL, CACerts: c.certificates})
			if err != nil {
				t.Fatal(err)
			}
			if a, err := sink.post(t.Context(), batchMediaType, []byte("[]")); (err == nil && a.taken()) != c.trusted {
				t.Errorf("got %v, %v", a, err)
			}
		})
	}
}

func TestAnswer(t *testing.T) {
	long := strings.Repeat("é", maxReason)
	for name, c := range map[string]struct {
		mediaType, said string
		reason          string
		index           int
	}{
		"a problem":                     {"application/problem+json", `{"title":"t","detail":"d","index":3}`, "d", 3},
		"a problem without a detail":    {"application/problem+json", `{"title":"t"}`, "t", -1},
		"an index that is negative":     {"application/problem+json", `{"detail":"d","index":-2}`, "d", -1},
		"an index that is no integer":   {"application/problem+json", `{"detail":"d","index":"3"}`, `{"detail":"d","index":"3"}`, -1},
		"JSON that is no problem":       {"application/json", `{"detail":"d","index":3}`, `{"detail":"d","index":3}`, -1},
		"text of two lines":             {"text/plain", "a\nb\x00\n", "a b", -1},
		"nothing":                       {"", "", "Bad Request", -1},
		"a problem that is broken JSON": {"application/problem+json", `{`, "{", -1},
		"what is not UTF-8":             {"text/plain", "a\xff", "a\uFFFD", -1},
		"too long":                      {"text/plain", long, long[:maxReason], -1},
	} {
		t.Run(name, func(t *testing.T) {
			a := &answer{status: 400, index: -1}
			a.read(c.mediaType, []byte(c.said))
			if a.reason != c.reason || a.index != c.index {
				t.Errorf("got %q, %d", a.reason, a.index)
			}
			if !utf8.ValidString(a.reason) || len(a.reason) > maxReason {
				t.Errorf("%q can't be an attribute", a.reason)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 8, 1, 0, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"":                              0,
		"2":                             2 * time.Second,
		"-1":                            0,
		"99999999999":                   maxRetryAfter,
		"86400":                         maxRetryAfter,
		"Sat, 01 Aug 2026 00:00:05 GMT": 5 * time.Second,
		"Fri, 31 Jul 2026 00:00:00 GMT": 0,
		"soon":                          0,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("%q: got %v, want %v", header, got, want)
		}
	}
}

// TestTroubleIsSaidOnce: three batches meet the same outage, and the log has one line for its begin and one for its end.
func TestTroubleIsSaidOnce(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	var peer trouble
	var batches [3]backoff
	for range 4 {
		for i := range batches {
			peer.begins(&batches[i], errors.New("503"))
		}
	}
	for i := range batches {
		peer.over(&batches[i])
		peer.over(&batches[i])
	}
	if said := log.String(); strings.Count(said, "is away") != 1 || strings.Count(said, `msg="is back"`) != 1 || strings.Count(said, "\n") != 2 {
		t.Errorf("the log says\n%s", said)
	}
}

func TestPauseGrowsAndIsBounded(t *testing.T) {
	var b backoff
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	var last time.Duration
	for range 20 {
		if b.pause(ended, time.Hour) {
			t.Fatal("it did not hear of the end")
		}
		if b.last < last || b.last > maxBackoff {
			t.Fatalf("%v after %v", b.last, last)
		}
		last = b.last
	}
	if last != maxBackoff {
		t.Errorf("it ends at %v", last)
	}
}

// fake is a stream that remembers what was settled.
type fake struct {
	closed  bool
	settled [][]int64
}

func (f *fake) takes(int64) bool { return !f.closed }
func (f *fake) settles(at []int64) {
	f.settled = append(f.settled, append([]int64(nil), at...))
}

func TestInbox(t *testing.T) {
	open, gone := &fake{}, &fake{closed: true}
	of := func(from stream, sizes ...int) []Event {
		var all []Event
		for i, size := range sizes {
			all = append(all, Event{JSON: make([]byte, size), from: from, at: int64(i)})
		}
		return all
	}
	for name, c := range map[string]struct {
		waiting []Event
		most    int
		want    []int // how many each Take returns
	}{
		"all that waits":                        {of(open, 1, 1, 1), 10, []int{3}},
		"at most so many":                       {of(open, 1, 1, 1), 2, []int{2, 1}},
		"about so many bytes":                   {of(open, MostBytes/2, MostBytes/2, MostBytes/2), 10, []int{2, 1}},
		"one that is too large by itself":       {of(open, 1, 2*MostBytes, 1), 10, []int{1, 1, 1}},
		"not what its stream no longer has":     {append(of(gone, 1, 1), of(open, 1)...), 10, []int{1}},
		"what is dropped makes room for others": {append(of(gone, MostBytes, MostBytes), of(open, MostBytes)...), 10, []int{1}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newInbox()
			b.force(c.waiting...)
			for i, want := range c.want {
				if got := len(b.take(t.Context(), 1, c.most)); got != want {
					t.Fatalf("Take %d returns %d, want %d", i, got, want)
				}
			}
			if len(b.waiting) != 0 || b.bytes != 0 {
				t.Errorf("%d events of %d bytes are left", len(b.waiting), b.bytes)
			}
		})
	}
}

func TestTakeWaitsForTheLeast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newInbox()
		stream := &fake{}
		var taken []int
		ctx, cancel := context.WithCancel(t.Context())
		var taking sync.WaitGroup
		taking.Go(func() {
			for batch := b.take(ctx, 3, 10); batch != nil; batch = b.take(ctx, 3, 10) {
				taken = append(taken, len(batch))
			}
		})
		for _, puts := range []struct {
			sizes []int
			want  []int // what has been taken then
		}{
			{[]int{1, 1}, nil},
			{[]int{1}, []int{3}},
			{[]int{1, 1, 1, 1}, []int{3, 4}},
			{[]int{MostBytes}, []int{3, 4, 1}}, // as much as a batch may hold
		} {
			for _, size := range puts.sizes[:len(puts.sizes)-1] {
				b.waiting = append(b.waiting, Event{JSON: make([]byte, size), from: stream})
				b.bytes += size
			}
			b.force(Event{JSON: make([]byte, puts.sizes[len(puts.sizes)-1]), from: stream})
			synctest.Wait()
			if !slices.Equal(taken, puts.want) {
				t.Fatalf("taken %v, want %v", taken, puts.want)
			}
		}
		cancel()
		taking.Wait()
	})
}

func TestInboxIsBounded(t *testing.T) {
	b := newInbox()
	stream := &fake{}
	one := Event{JSON: []byte("{}"), from: stream}
	for range inboxMost + 1 {
		b.put(nil, one)
	}
	gaveUp := make(chan struct{})
	close(gaveUp)
	b.put(gaveUp, one)
	if len(b.waiting) != inboxMost+1 {
		t.Fatalf("%d wait", len(b.waiting))
	}
	put := make(chan struct{})
	go func() {
		defer close(put)
		b.put(nil, one)
	}()
	if got := len(b.take(t.Context(), 1, 1000)); got != 1000 {
		t.Fatalf("Take returns %d", got)
	}
	<-put
	if len(b.waiting) != inboxMost+2-1000 {
		t.Errorf("%d wait", len(b.waiting))
	}
}

func TestSettleTellsEachStream(t *testing.T) {
	a, b := &fake{}, &fake{}
	settle([]Event{{from: a, at: 1}, {from: a, at: 2}, {from: b, at: 7}, {from: a, at: 3}})
	if len(a.settled) != 2 || len(a.settled[0]) != 2 || len(b.settled) != 1 || b.settled[0][0] != 7 || a.settled[1][0] != 3 {
		t.Errorf("got %v and %v", a.settled, b.settled)
	}
}

func TestMarkBoundsTheReason(t *testing.T) {
	sink, err := NewSink(SinkSettings{Sink: "http://writer"})
	if err != nil {
		t.Fatal(err)
	}
	d := &delivery{sink: sink}
	all := reports("a", 1)
	a := &answer{status: 400}
	a.read("text/plain", bytes.Repeat([]byte("x"), maxAnswer))
	e := d.mark(letter{Event{JSON: events.AppendJSON(nil, &all[0])}, a})
	if got, _ := e.Extensions()[errorData].(string); len(got) != maxReason {
		t.Errorf("%d bytes", len(got))
	}
	if err := e.Validate(); err != nil {
		t.Error(err)
	}
}
