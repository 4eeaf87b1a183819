package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"isobar.dev/events"
	"isobar.dev/events/api"
	"isobar.dev/internal/peer"
	publisherv1 "isobar.dev/proto/isobar/publisher/v1"
)

// service is a publisher whose answers the test decides, on a real port.
type service struct {
	publisherv1.UnimplementedPublisherServiceServer
	addr   string
	answer func(ctx context.Context, ids []string) error // nil: OK
	creds  credentials.TransportCredentials              // nil: none

	calls  atomic.Int64
	mu     sync.Mutex
	stored map[string]int // ids of calls that were answered OK
}

func (s *service) Publish(ctx context.Context, r *publisherv1.PublishRequest) (*publisherv1.PublishResponse, error) {
	s.calls.Add(1)
	var ids []string
	for _, e := range r.Events {
		ids = append(ids, e.Id)
	}
	if s.answer != nil {
		if err := s.answer(ctx, ids); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		s.stored[id]++
	}
	return &publisherv1.PublishResponse{}, nil
}

func (s *service) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stored[id] > 0
}

func newService(t *testing.T) *service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return &service{addr: l.Addr().String(), stored: map[string]int{}}
}

// start serves until stop, which cuts what is under way.
func (s *service) start(t *testing.T) (stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(s.creds))
	publisherv1.RegisterPublisherServiceServer(server, s)
	done := make(chan struct{})
	go func() { _ = server.Serve(l); close(done) }()
	stop = sync.OnceFunc(func() { server.Stop(); <-done })
	t.Cleanup(stop)
	return stop
}

func open(t *testing.T, addr string, groupSize int) *publisher {
	t.Helper()
	return openTLS(t, addr, peer.TLS{}, groupSize)
}

func openTLS(t *testing.T, addr string, secure peer.TLS, groupSize int) *publisher {
	t.Helper()
	p, err := newPublisher(addr, secure, groupSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

func reports(prefix string, n int) []event.Event {
	all := make([]event.Event, n)
	for i := range all {
		all[i] = events.New(events.Report{Country: "GT", Weather: "Sunny"}, fmt.Sprint(prefix, i), time.Now())
	}
	return all
}

// publish is one request of n reports in the background.
func publish(t *testing.T, p *publisher, prefix string, n int) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.publish(t.Context(), reports(prefix, n)) }()
	return done
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("in vain waited for: " + what)
		}
	}
}

func TestRequestsAreGrouped(t *testing.T) {
	s, gate := newService(t), make(chan struct{})
	var held atomic.Int64
	s.answer = func(context.Context, []string) error {
		held.Add(1)
		<-gate
		return nil
	}
	s.start(t)
	p := open(t, s.addr, 500)
	var all []<-chan error
	for i := range inFlight {
		all = append(all, publish(t, p, fmt.Sprintf("first-%d-", i), 500)) // a full group begins beside others
		await(t, "the calls that may be under way", func() bool { return held.Load() == int64(i+1) })
	}
	for i := range 300 {
		all = append(all, publish(t, p, fmt.Sprintf("then-%d-", i), 1+i%2))
	}
	time.Sleep(50 * time.Millisecond) // until most of them wait: the bound below leaves room for those that don't
	close(gate)
	for _, done := range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := s.calls.Load(); n > inFlight+20 {
		t.Errorf("%d calls for %d requests", n, len(all))
	}
	if len(s.stored) != inFlight*500+450 {
		t.Errorf("%d reports have arrived", len(s.stored))
	}
	for id, n := range s.stored {
		if n != 1 {
			t.Errorf("%s has arrived %d times", id, n)
		}
	}
}

func TestWithoutGroupingEachRequestIsACall(t *testing.T) {
	s, arrived := newService(t), make(chan struct{}, 20)
	gate := make(chan struct{})
	s.answer = func(_ context.Context, ids []string) error {
		if len(ids) != 1 {
			t.Errorf("a call of %d", len(ids))
		}
		arrived <- struct{}{}
		<-gate
		return nil
	}
	s.start(t)
	p := open(t, s.addr, 1)
	var all []<-chan error
	for i := range 20 {
		all = append(all, publish(t, p, fmt.Sprint(i, "-"), 1))
	}
	for range all {
		<-arrived // all at once
	}
	close(gate)
	for _, done := range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestSlowPublisher: what waits is bounded, and what is beyond is told so at once.
func TestSlowPublisher(t *testing.T) {
	s, gate := newService(t), make(chan struct{})
	var held atomic.Int64
	s.answer = func(context.Context, []string) error { held.Add(1); <-gate; return nil }
	s.start(t)
	p := open(t, s.addr, 500)
	var all []<-chan error
	for i := range inFlight {
		all = append(all, publish(t, p, fmt.Sprintf("held-%d-", i), 500))
		await(t, "the calls that may be under way", func() bool { return held.Load() == int64(i+1) })
	}
	refused := make(chan error, 100)
	for i := range 100 {
		go func() {
			start := time.Now()
			err := p.publish(t.Context(), reports(fmt.Sprintf("wait-%d-", i), 100))
			if err != nil && time.Since(start) > 5*time.Second {
				t.Errorf("told only after %v", time.Since(start))
			}
			refused <- err
		}()
	}
	for range 100 - waiting/100 {
		var notNow *api.NotNow
		if err := <-refused; !errors.As(err, &notNow) || !notNow.Busy || notNow.RetryAfter <= 0 {
			t.Errorf("what finds no room is told %v", err)
		}
	}
	close(gate)
	for range waiting / 100 {
		if err := <-refused; err != nil {
			t.Errorf("what waited: %v", err)
		}
	}
	for _, done := range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestPublisherAway(t *testing.T) {
	s := newService(t)
	p := open(t, s.addr, 500)
	start := time.Now()
	for i := range 50 {
		var notNow *api.NotNow
		err := p.publish(t.Context(), reports(fmt.Sprint("away-", i, "-"), 1))
		if !errors.As(err, &notNow) || notNow.Busy || !strings.Contains(notNow.Detail, "away") {
			t.Fatalf("told %v", err)
		}
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("50 calls took %v", took)
	}
	for range 2 { // it comes, goes and comes again
		stop := s.start(t)
		await(t, "the publisher, by itself", func() bool { return p.publish(t.Context(), reports("back-", 1)) == nil })
		stop()
		if err := p.publish(t.Context(), reports("gone-", 1)); err == nil {
			t.Error("promised by nobody")
		}
	}
}

func TestStatus(t *testing.T) {
	with := func(code codes.Code, details ...protoadapt.MessageV1) error {
		s, err := status.New(code, "said").WithDetails(details...)
		if err != nil {
			t.Fatal(err)
		}
		return s.Err()
	}
	retry := &errdetails.RetryInfo{RetryDelay: durationpb.New(7 * time.Second)}
	s := newService(t)
	s.start(t)
	front := httptest.NewServer(api.Handler(open(t, s.addr, 500).publish))
	t.Cleanup(front.Close)
	for _, c := range []struct {
		name   string
		answer error
		status int
		after  string
		says   string
	}{
		{"OK", nil, 202, "", `"id":"k"`},
		{"a broker is away", with(codes.Unavailable, &errdetails.ErrorInfo{Metadata: map[string]string{"broker": "kafka"}}, retry), 503, "7", "kafka"},
		{"unavailable, without details", with(codes.Unavailable), 503, "1", "away"},
		{"too much under way", with(codes.ResourceExhausted, retry), 429, "7", "too many"},
		{"no word in time", with(codes.DeadlineExceeded, retry), 503, "7", "not confirmed in time"},
		{"refused: a publisher of another version", with(codes.InvalidArgument, &errdetails.BadRequest{}), 503, "1", "different versions: said"},
		{"canceled", with(codes.Canceled), 503, "1", "nothing is promised"},
		{"a service that is not there", with(codes.Unimplemented), 503, "1", "nothing is promised"},
		{"a fault", with(codes.Internal), 503, "1", "nothing is promised"},
		{"unknown", errors.New("what"), 503, "1", "nothing is promised"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.answer = func(context.Context, []string) error { return c.answer }
			code, header, body := post(t, front.URL, "k")
			if code != c.status || header.Get("Retry-After") != c.after || !strings.Contains(body, c.says) || !strings.Contains(body, `"id":"k"`) {
				t.Errorf("%d after %q: %s", code, header.Get("Retry-After"), body)
			}
		})
	}
}

// post sends one report under a key; the code is 0 where there was no answer.
func post(t *testing.T, url, key string) (code int, header http.Header, body string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/reports", strings.NewReader(`{"country":"GT","weather":"Sunny"}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, nil, ""
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	return response.StatusCode, response.Header, string(text)
}

// TestOneBadEventIsAlone: when the publisher refuses a group for one request's event, the others are taken.
func TestOneBadEventIsAlone(t *testing.T) {
	s, gate := newService(t), make(chan struct{})
	var held atomic.Int64
	s.answer = func(_ context.Context, ids []string) error {
		if held.Add(1) <= inFlight {
			<-gate
		}
		for _, id := range ids {
			if strings.HasPrefix(id, "bad") {
				return status.Error(codes.InvalidArgument, id)
			}
		}
		return nil
	}
	s.start(t)
	p := open(t, s.addr, 500)
	var good []<-chan error
	for i := range inFlight {
		good = append(good, publish(t, p, fmt.Sprintf("first-%d-", i), 500))
		await(t, "the calls that may be under way", func() bool { return held.Load() == int64(i+1) })
	}
	for i := range 20 {
		good = append(good, publish(t, p, fmt.Sprintf("good-%d-", i), 2))
	}
	bad := publish(t, p, "bad-", 2)
	time.Sleep(20 * time.Millisecond)
	close(gate)
	for _, done := range good {
		if err := <-done; err != nil {
			t.Errorf("a neighbour: %v", err)
		}
	}
	var notNow *api.NotNow
	if err := <-bad; !errors.As(err, &notNow) {
		t.Errorf("the bad one: %v", err)
	}
	if s.has("bad-0") || s.has("bad-1") {
		t.Error("the bad one was stored")
	}
}

func TestDeadline(t *testing.T) {
	s, gate := newService(t), make(chan struct{})
	deadlines := make(chan time.Duration, 1)
	s.answer = func(ctx context.Context, _ []string) error {
		deadline, _ := ctx.Deadline()
		deadlines <- time.Until(deadline)
		<-gate
		return nil
	}
	s.start(t)
	p := open(t, s.addr, 500)
	t.Cleanup(func() { close(gate) })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := p.publish(ctx, reports("x", 1)); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	if left := <-deadlines; left > timeout || left < timeout-2*time.Second {
		t.Errorf("the publisher is given %v", left)
	}
}

// TestPromise: whatever the publisher answers, and however often it is cut off, what is answered 202 was confirmed by
// it, and what is resent until 202 arrives.
func TestPromise(t *testing.T) {
	s := newService(t)
	s.answer = func(context.Context, []string) error {
		switch n := rand.N(10); {
		case n < 4:
			return status.Error([]codes.Code{codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Internal}[n], "no")
		case n < 6:
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	stop := s.start(t)
	front := httptest.NewServer(api.Handler(open(t, s.addr, 20).publish))
	t.Cleanup(front.Close)
	var clients sync.WaitGroup
	for c := range 30 {
		clients.Go(func() {
			for i := range 20 {
				key := fmt.Sprintf("%d-%d", c, i)
				for code := 0; code != http.StatusAccepted; code, _, _ = post(t, front.URL, key) {
					if code != 0 && code != 429 && code != 503 {
						t.Errorf("answered %d", code)
						return
					}
					if t.Context().Err() != nil {
						return
					}
				}
				if !s.has(key) {
					t.Errorf("%s was answered 202 and not confirmed", key)
				}
			}
		})
	}
	for range 5 {
		before := s.calls.Load()
		await(t, "calls", func() bool { return s.calls.Load() > before+5 })
		stop()
		stop = s.start(t)
	}
	clients.Wait()
}

func TestClose(t *testing.T) {
	s, gate := newService(t), make(chan struct{})
	s.answer = func(context.Context, []string) error { <-gate; return nil }
	s.start(t)
	p := open(t, s.addr, 500)
	underWay := publish(t, p, "x", 1)
	await(t, "the call", func() bool { return s.calls.Load() == 1 })
	closed := make(chan struct{})
	go func() { p.close(); close(closed) }()
	await(t, "no more being taken", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		var notNow *api.NotNow
		return errors.As(p.publish(ctx, reports("late", 1)), &notNow)
	})
	close(gate)
	<-closed
	if err := <-underWay; err != nil {
		t.Errorf("what was under way: %v", err)
	}
}

func TestBuild(t *testing.T) {
	for _, size := range []int{0, -1, 5001} {
		if _, err := build(t.Context(), settings{Port: "0", Publisher: "127.0.0.1:1", GroupSize: size}); err == nil || !strings.Contains(err.Error(), "GROUP_SIZE") {
			t.Errorf("GROUP_SIZE=%d: %v", size, err)
		}
	}
	p, err := build(t.Context(), settings{Host: "127.0.0.1", Port: "8080", Publisher: "127.0.0.1:1", GroupSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Listeners[0].Addr != "127.0.0.1:8080" || p.Peers()["publisher"] != "IDLE" {
		t.Errorf("listens on %s, its peers are %v", p.Listeners[0].Addr, p.Peers())
	}
}
