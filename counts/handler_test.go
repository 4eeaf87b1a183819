package counts_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"isobar.dev/counts"
	"isobar.dev/events"
)

// fake is a store that does what a test says and keeps what was counted.
type fake struct {
	counts.Store
	count func(context.Context, []events.Arrival) error

	mu  sync.Mutex
	got [][]events.Arrival
}

func (f *fake) Count(ctx context.Context, all []events.Arrival) error {
	if f.count != nil {
		if err := f.count(ctx, all); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.got = append(f.got, append([]events.Arrival(nil), all...))
	return nil
}

func (f *fake) counted() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, all := range f.got {
		n += len(all)
	}
	return n
}

func handlerOf(t testing.TB, store counts.Store, groupSize int) *counts.Handler {
	t.Helper()
	h, err := counts.NewHandler(store, groupSize)
	must(t, err)
	return h
}

const (
	structured = "application/cloudevents+json"
	batched    = "application/cloudevents-batch+json"
)

func one(id, report string) string {
	return fmt.Sprintf(`{"specversion":"1.0","id":%q,"source":"s","type":"dev.isobar.weather.report.v1","data":%s}`, id, report)
}

const sunny = `{"country":"GT","weather":"Sunny"}`

func binaryHeader(id string) map[string]string {
	return map[string]string{
		"Content-Type": "application/json", "Ce-Specversion": "1.0", "Ce-Id": id, "Ce-Source": "s", "Ce-Type": events.Type,
	}
}

func TestHandler(t *testing.T) {
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			b.WriteString("," + one(fmt.Sprint(i), sunny))
		}
		return "[" + b.String()[1:] + "]"
	}
	with := func(header map[string]string, name, value string) map[string]string {
		changed := map[string]string{name: value}
		for n, v := range header {
			if n != name {
				changed[n] = v
			}
		}
		return changed
	}
	kindOf := func(contentType string) map[string]string { return map[string]string{"Content-Type": contentType} }
	no := func(err error) func(context.Context, []events.Arrival) error {
		return func(context.Context, []events.Arrival) error { return err }
	}
	index := func(i int) *int { return &i }
	for _, c := range []struct {
		name, method, path string
		header             map[string]string
		body               string
		store              func(context.Context, []events.Arrival) error

		status  int
		counted int
		says    string
		index   *int
		retry   string
		allow   string
	}{
		{name: "one event in binary mode", header: binaryHeader("1"), body: sunny, status: 204, counted: 1},
		{name: "one event in structured mode", header: kindOf(structured), body: one("1", sunny), status: 204, counted: 1},
		{name: "a batch", header: kindOf(batched), body: many(3), status: 204, counted: 3},
		{name: "a batch of none", header: kindOf(batched), body: "[]", status: 204},
		{name: "as many events as there may be", header: kindOf(batched), body: many(counts.MaxEvents), status: 204, counted: counts.MaxEvents},
		{
			name: "what Knative's Kafka source makes of a plain message", header: map[string]string{
				"Ce-Specversion": "1.0", "Ce-Id": "partition:1/offset:7", "Ce-Source": "/apis/v1/namespaces/n/kafkasources/k#message",
				"Ce-Type": "dev.knative.kafka.event", "Ce-Subject": "partition:1#7", "Prefer": "reply",
			}, body: sunny, status: 204, counted: 1,
		},

		{name: "an empty body", header: kindOf(structured), status: 400, says: "empty"},
		{name: "broken JSON", header: kindOf(structured), body: `{"specversion":`, status: 400},
		{name: "broken JSON as data", header: binaryHeader("1"), body: `{"country":`, status: 400},
		{name: "a batch that ends too early", header: kindOf(batched), body: strings.TrimSuffix(many(2), "]"), status: 400},
		{name: "no CloudEvent", header: kindOf(structured), body: sunny, status: 400, says: "specversion"},
		{name: "no CloudEvent in the middle of a batch", header: kindOf(batched), body: "[" + one("1", sunny) + "," + sunny + "," + one("2", sunny) + "]", status: 400, index: index(1)},

		{name: "no country", header: binaryHeader("1"), body: `{"country":"XX","weather":"Sunny"}`, status: 422, says: "country"},
		{name: "an event without an id", header: with(binaryHeader("1"), "Ce-Id", ""), body: sunny, status: 422, says: "id"},
		{name: "an event of another type", header: with(binaryHeader("1"), "Ce-Type", "other"), body: sunny, status: 422, says: "type"},
		{name: "a broken rule in the middle of a batch", header: kindOf(batched), body: "[" + one("1", sunny) + "," + one("2", `{"country":"GT"}`) + "," + one("3", sunny) + "]", status: 422, says: "weather", index: index(1)},
		{name: "a broken rule at the beginning of a batch", header: kindOf(batched), body: "[" + one("2", `{}`) + "]", status: 422, index: index(0)},
		{name: "a batch that is an object", header: kindOf(batched), body: one("1", sunny), status: 422},

		{name: "a body that is too large", header: binaryHeader("1"), body: strings.Repeat(" ", counts.MaxBody+1), status: 413, says: "4194304"},
		{name: "more events than there may be", header: kindOf(batched), body: many(counts.MaxEvents + 1), status: 413, says: "5000"},

		{name: "plain JSON", header: kindOf("application/json"), body: sunny, status: 415},
		{name: "text", header: kindOf("text/plain"), body: "Sunny", status: 415},
		{name: "no content type", body: sunny, status: 415},
		{name: "a compressed body", header: with(kindOf(structured), "Content-Encoding", "gzip"), body: "\x1f\x8b", status: 415},

		{name: "GET", method: "GET", status: 405, allow: "POST"},
		{name: "DELETE", method: "DELETE", status: 405, allow: "POST"},
		{name: "another path", path: "/reports", header: binaryHeader("1"), body: sunny, status: 404, says: "/"},

		{
			name: "a store that is away", header: binaryHeader("1"), body: sunny,
			store:  no(&counts.Failure{Err: errors.New("connection refused")}),
			status: 503, says: "connection refused", retry: "1",
		},
		{
			name: "a store that somebody has to repair", header: binaryHeader("1"), body: sunny,
			store:  no(&counts.Failure{Err: errors.New("NOAUTH"), Lasting: true, Advice: "set REDIS_PASSWORD"}),
			status: 503, says: "set REDIS_PASSWORD", retry: "10",
		},
		{
			name: "a store that fails in an unknown way", header: binaryHeader("1"), body: sunny,
			store: no(errors.New("what is this")), status: 503, retry: "1",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			store := &fake{count: c.store}
			method, path := c.method, c.path
			if method == "" {
				method = http.MethodPost
			}
			if path == "" {
				path = "/"
			}
			r := httptest.NewRequest(method, path, strings.NewReader(c.body))
			for name, value := range c.header {
				r.Header.Set(name, value)
			}
			w := httptest.NewRecorder()
			handlerOf(t, store, 1000).ServeHTTP(w, r)
			if w.Code != c.status {
				t.Fatalf("status %d, not %d: %s", w.Code, c.status, w.Body)
			}
			if n := store.counted(); n != c.counted {
				t.Errorf("%d were counted, not %d", n, c.counted)
			}
			if got := w.Header().Get("Retry-After"); got != c.retry {
				t.Errorf("Retry-After is %q, not %q", got, c.retry)
			}
			if got := w.Header().Get("Allow"); got != c.allow {
				t.Errorf("Allow is %q, not %q", got, c.allow)
			}
			if c.status == 204 {
				if w.Body.Len() > 0 {
					t.Errorf("204 has a body: %s", w.Body)
				}
				return
			}
			p := problemOf(t, w.Result())
			if !strings.Contains(p.Detail, c.says) {
				t.Errorf("the detail does not say %q: %s", c.says, p.Detail)
			}
			if c.index != nil && (p.Index == nil || *p.Index != *c.index) {
				t.Errorf("the index is not %d: %s", *c.index, w.Body)
			}
		})
	}
}

type problemDocument struct {
	Status int
	Title  string
	Detail string
	Index  *int
}

func problemOf(t testing.TB, res *http.Response) (p problemDocument) {
	t.Helper()
	if got := res.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("the content type is %q", got)
	}
	must(t, json.NewDecoder(res.Body).Decode(&p))
	if p.Status != res.StatusCode || p.Title == "" || p.Detail == "" {
		t.Errorf("the problem document is %+v", p)
	}
	return p
}

func post(ctx context.Context, t testing.TB, h http.Handler, header map[string]string, body string) *http.Response {
	t.Helper()
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", strings.NewReader(body))
	for name, value := range header {
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

// gate is a store that does nothing until it is opened.
func gate() (store *fake, open func()) {
	opened := make(chan struct{})
	return &fake{count: func(ctx context.Context, _ []events.Arrival) error {
		select {
		case <-opened:
			return nil
		case <-ctx.Done():
			return &counts.Failure{Err: ctx.Err()}
		}
	}}, sync.OnceFunc(func() { close(opened) })
}

// sending posts requests, each in a goroutine of its own, and checks the status of each.
type sending struct {
	t       *testing.T
	handler http.Handler
	sync.WaitGroup
}

func (s *sending) send(id, report string, status int) {
	s.Go(func() {
		if res := post(s.t.Context(), s.t, s.handler, binaryHeader(id), report); res.StatusCode != status {
			s.t.Errorf("%s: status %d, not %d", id, res.StatusCode, status)
		}
	})
}

func TestHandlerGathersWhatWaitsAndARefusedRequestHarmsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, open := gate()
		s := sending{t: t, handler: handlerOf(t, store, 1000)}
		s.send("first", sunny, 204)
		synctest.Wait()
		for i := range 100 {
			s.send(fmt.Sprint("good", i), sunny, 204)
		}
		for i := range 10 {
			s.send(fmt.Sprint("bad", i), `{"country":"XX"}`, 422)
		}
		synctest.Wait()
		open()
		s.Wait()
		if n, calls := store.counted(), len(store.got); n != 101 || calls != 2 {
			t.Errorf("%d were counted in %d calls, not 101 in 2", n, calls)
		}
	})
}

func TestHandlerWithAGroupOfOneMakesACallForEachRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, open := gate()
		s := sending{t: t, handler: handlerOf(t, store, 1)}
		for i := range 200 {
			s.send(fmt.Sprint(i), sunny, 204)
		}
		synctest.Wait()
		open()
		s.Wait()
		if len(store.got) != 200 {
			t.Errorf("%d calls, not 200", len(store.got))
		}
	})
}

func TestHandlerSaysAtOnceThatTooMuchIsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, open := gate()
		h := handlerOf(t, store, 1000)
		small := strings.TrimSuffix(strings.Repeat(one("1", sunny)+",", counts.MaxEvents), ",")
		var senders sync.WaitGroup
		for range 12 { // two are under way, the others wait
			senders.Go(func() {
				if res := post(t.Context(), t, h, map[string]string{"Content-Type": batched}, "["+small+"]"); res.StatusCode != 204 {
					t.Errorf("status %d", res.StatusCode)
				}
			})
			synctest.Wait()
		}
		start := time.Now()
		res := post(t.Context(), t, h, binaryHeader("1"), sunny)
		if res.StatusCode != 503 || res.Header.Get("Retry-After") != "1" || time.Since(start) > 0 {
			t.Errorf("status %d after %v", res.StatusCode, time.Since(start))
		}
		open()
		senders.Wait()
	})
}

func TestHandlerAnswersBeforeLong(t *testing.T) {
	for name, limit := range map[string]time.Duration{"the caller's deadline": 20 * time.Millisecond, "its own": time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, open := gate()
				defer open()
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				start := time.Now()
				res := post(ctx, t, handlerOf(t, store, 1000), binaryHeader("1"), sunny)
				if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || time.Since(start) > 10*time.Second {
					t.Errorf("status %d after %v", res.StatusCode, time.Since(start))
				}
			})
		})
	}
}

func TestHandlerClosesOnceWhatItTookIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, open := gate()
		h := handlerOf(t, store, 1000)
		s := sending{t: t, handler: h}
		s.send("before", sunny, 204)
		synctest.Wait()
		var closed atomic.Bool
		s.Go(func() { h.Close(); closed.Store(true) })
		synctest.Wait()
		if closed.Load() {
			t.Error("it closed before it was done")
		}
		s.send("after", sunny, 503)
		synctest.Wait()
		open()
		s.Wait()
	})
}

// What is wrong with one weather's count must not hold up those who report another.
func TestHandlerCountsTheOthersWhenTheStoreRefusesOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, open := gate()
		wait := store.count
		store.count = func(ctx context.Context, all []events.Arrival) error {
			for _, a := range all {
				if a.Report.Weather == "Broken" {
					return &counts.Failure{Lasting: true, Contents: true, Err: errors.New("NOTANUMBER")}
				}
			}
			return wait(ctx, all)
		}
		s := sending{t: t, handler: handlerOf(t, store, 1000)}
		for i := range 2 {
			s.send(fmt.Sprint("first", i), sunny, 204)
			synctest.Wait()
		}
		for i := range 20 {
			s.send(fmt.Sprint(i), sunny, 204)
		}
		s.send("broken", `{"country":"GT","weather":"Broken"}`, 503)
		synctest.Wait()
		open()
		s.Wait()
		if n := store.counted(); n != 22 {
			t.Errorf("%d were counted", n)
		}
	})
}

func TestHandlerAnswersWhenThereIsNoRoomForABody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handlerOf(t, &fake{}, 1000)
		var slow sync.WaitGroup
		never, end := io.Pipe()
		defer slow.Wait()
		defer func() { _ = end.Close() }()
		for range 2 {
			r := httptest.NewRequest(http.MethodPost, "/", never)
			r.Header.Set("Content-Type", batched)
			slow.Go(func() { h.ServeHTTP(httptest.NewRecorder(), r) })
			synctest.Wait()
		}
		large := httptest.NewRequest(http.MethodPost, "/", io.LimitReader(zeros{}, counts.MaxBody))
		large.Header.Set("Content-Type", batched)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, large)
		if w.Code != 503 {
			t.Errorf("status %d where there is no room", w.Code)
		}
	})
}

func TestHandlerRefusesABodyThatIsTooLargeWhateverItsLengthIsSaidToBe(t *testing.T) {
	s := httptest.NewServer(handlerOf(t, &fake{}, 1000))
	defer s.Close()
	for _, length := range []int64{-1, counts.MaxBody + 1} {
		r, err := http.NewRequest(http.MethodPost, s.URL, io.LimitReader(zeros{}, counts.MaxBody+1))
		must(t, err)
		r.ContentLength = length
		r.Header.Set("Content-Type", batched)
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			continue // it hung up while the rest was being sent
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("length %d: status %d", length, res.StatusCode)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func TestHandlerKeepsAConnectionOpenFromRequestToRequest(t *testing.T) {
	store := &fake{}
	s := httptest.NewServer(handlerOf(t, store, 1000))
	defer s.Close()
	var dials int
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials++
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}}}
	for i, body := range []string{one("1", sunny), one("2", "{}"), "", one("3", sunny)} {
		res, err := client.Post(s.URL, structured, strings.NewReader(body))
		must(t, err)
		_, _ = io.Copy(io.Discard, res.Body)
		must(t, res.Body.Close())
		if res.StatusCode >= 500 {
			t.Errorf("%d: status %d", i, res.StatusCode)
		}
	}
	if dials != 1 || store.counted() != 2 {
		t.Errorf("%d connections, %d counted", dials, store.counted())
	}
}

func TestNewHandlerNamesTheVariableThatIsWrong(t *testing.T) {
	for _, size := range []int{-1, 0, counts.MaxEvents + 1} {
		if _, err := counts.NewHandler(&fake{}, size); err == nil || !strings.Contains(err.Error(), "GROUP_SIZE") {
			t.Errorf("%d: %v", size, err)
		}
	}
}

func FuzzHandler(f *testing.F) {
	body, _ := batch(arrivals("fuzz", 0, 3))
	f.Add(0, "", []byte(sunny))
	f.Add(1, "", []byte(one("1", sunny)))
	f.Add(2, "", body)
	f.Add(2, "", []byte("["+one("1", sunny)+","+one("2", "{}")+"]"))
	f.Add(2, "", bytes.Repeat([]byte("["), 20_000))
	f.Add(0, "%00", []byte(`{"country":"GT","weather":"\ud800"}`))
	f.Add(1, "", []byte(`{"specversion":"1.0","id":"1","source":"s","type":"dev.isobar.weather.report.v1","data_base64":1}`))
	f.Fuzz(func(t *testing.T, mode int, id string, body []byte) {
		store := &fake{}
		header := binaryHeader("1")
		switch mode % 3 {
		case 0:
			if id != "" {
				header["Ce-Id"] = id
			}
		case 1:
			header = map[string]string{"Content-Type": structured}
		default:
			header = map[string]string{"Content-Type": batched}
		}
		res := post(t.Context(), t, handlerOf(t, store, 1000), header, string(body))
		switch res.StatusCode {
		case 204:
			for _, all := range store.got {
				for _, a := range all {
					if a.ID == "" || a.Source == "" || a.Report.Country == "" || a.Report.Weather == "" || len(a.Report.Weather) > events.MaxWeather {
						t.Errorf("%+v was counted", a)
					}
				}
			}
		case 400, 413, 415, 422:
			problemOf(t, res)
			if store.counted() > 0 {
				t.Error("something was counted of what was refused")
			}
		default:
			t.Errorf("status %d", res.StatusCode)
		}
	})
}
