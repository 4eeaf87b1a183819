package group

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// bench is a Committer whose batches wait for the test's word.
type bench struct {
	*Committer[int]
	begun   atomic.Int64
	started chan []int // a batch as it begins
	answer  chan error // what becomes of it
}

func stepped(o Options[int]) *bench {
	b := &bench{started: make(chan []int), answer: make(chan error)}
	o.Commit = func(_ context.Context, batch []int) error {
		b.begun.Add(1)
		b.started <- slices.Clone(batch)
		return <-b.answer
	}
	if o.Batch == 0 {
		o.Batch = 100
	}
	if o.InFlight == 0 {
		o.InFlight = 1
	}
	if o.Waiting == 0 {
		o.Waiting = 1000
	}
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	b.Committer = New(o)
	return b
}

// send commits in the background, and returns once the items wait or are under way.
func (b *bench) send(items ...int) <-chan error {
	return b.sendWith(context.Background(), items...)
}

func (b *bench) sendWith(ctx context.Context, items ...int) <-chan error {
	before := b.seen()
	done := make(chan error, 1)
	go func() { done <- b.Commit(ctx, items...) }()
	for b.seen() == before && len(done) == 0 {
		time.Sleep(10 * time.Microsecond)
	}
	return done
}

// seen changes whenever items have begun to wait or are under way.
func (b *bench) seen() [2]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return [2]int{b.waiting, int(b.begun.Load())}
}

func (b *bench) expect(t *testing.T, want ...int) {
	t.Helper()
	select {
	case got := <-b.started:
		if !slices.Equal(got, want) {
			t.Fatalf("the batch is %v, want %v", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("no batch begins, want %v", want)
	}
}

func want(t *testing.T, done <-chan error, err error) {
	t.Helper()
	select {
	case got := <-done:
		if !errors.Is(got, err) {
			t.Fatalf("answered %v, want %v", got, err)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("not answered, want %v", err)
	}
}

func TestALoneItemIsCommittedAtOnce(t *testing.T) {
	b := stepped(Options[int]{})
	done := b.send(1)
	b.expect(t, 1)
	b.answer <- nil
	want(t, done, nil)
	if err := b.Commit(t.Context()); err != nil {
		t.Errorf("nothing at all: %v", err)
	}
}

func TestWhatArrivesMeanwhileIsTheNextBatch(t *testing.T) {
	b := stepped(Options[int]{})
	first := b.send(1)
	b.expect(t, 1)
	second, third := b.send(2), b.send(3, 4)
	b.answer <- nil
	want(t, first, nil)
	b.expect(t, 2, 3, 4)
	bad := errors.New("bad")
	b.answer <- bad
	want(t, second, bad)
	want(t, third, bad)
}

func TestBounds(t *testing.T) {
	for _, c := range []struct {
		name    string
		options Options[int]
		calls   [][]int // sent while a first batch is under way
		batches [][]int // that follow it
	}{
		{"no more than Batch items", Options[int]{Batch: 3}, [][]int{{1}, {2}, {3}, {4}}, [][]int{{1, 2, 3}, {4}}},
		{"the items of a call stay together", Options[int]{Batch: 3}, [][]int{{1, 2}, {3, 4}, {5}}, [][]int{{1, 2}, {3, 4, 5}}},
		{"a call that is larger than Batch is a batch of its own", Options[int]{Batch: 2}, [][]int{{1}, {2, 3, 4}, {5}}, [][]int{{1}, {2, 3, 4}, {5}}},
		{"no more than Bytes", Options[int]{Bytes: 10, Size: func(n int) int { return n }}, [][]int{{5}, {5}, {1}, {9}}, [][]int{{5, 5}, {1, 9}}},
		{"a call that is larger than Bytes is a batch of its own", Options[int]{Bytes: 10, Size: func(n int) int { return n }}, [][]int{{6, 6}, {1}}, [][]int{{6, 6}, {1}}},
		{"Batch of one groups nothing", Options[int]{Batch: 1}, [][]int{{1}, {2}}, [][]int{{1}, {2}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := stepped(c.options)
			all := []<-chan error{b.send(0)}
			b.expect(t, 0)
			for _, items := range c.calls {
				all = append(all, b.send(items...))
			}
			b.answer <- nil
			for _, batch := range c.batches {
				b.expect(t, batch...)
				b.answer <- nil
			}
			for _, done := range all {
				want(t, done, nil)
			}
		})
	}
}

func TestInFlight(t *testing.T) {
	b := stepped(Options[int]{InFlight: 2, Batch: 2})
	one := b.send(1)
	b.expect(t, 1)
	two := b.send(2)
	select {
	case batch := <-b.started:
		t.Fatalf("%v begins beside another batch, and is not full", batch)
	default:
	}
	three := b.send(3)
	b.expect(t, 2, 3)
	four, five := b.send(4), b.send(5)
	select {
	case batch := <-b.started:
		t.Fatalf("%v is a third batch under way", batch)
	default:
	}
	b.answer <- nil
	b.expect(t, 4, 5)
	b.answer <- nil
	b.answer <- nil
	for _, done := range []<-chan error{one, two, three, four, five} {
		want(t, done, nil)
	}
}

func TestABatchThatHangsHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		g := New(Options[int]{
			Commit: func(_ context.Context, items []int) error {
				if items[0] == 0 {
					<-hang
				}
				return nil
			},
			Batch: 100, InFlight: 2, Waiting: 100, Timeout: time.Minute,
		})
		var hanging sync.WaitGroup
		hanging.Go(func() { _ = g.Commit(t.Context(), 0) })
		synctest.Wait()
		start := time.Now()
		for i := range 3 {
			if err := g.Commit(t.Context(), i+1); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(start); took != patience {
			t.Errorf("three others took %v, want %v for the first and nothing for the next", took, patience)
		}
		close(hang)
		hanging.Wait()
		g.Close()
	})
}

func TestWaiting(t *testing.T) {
	b := stepped(Options[int]{Waiting: 3})
	first := b.send(0)
	b.expect(t, 0)
	second := b.send(1, 2)
	want(t, b.send(3, 4), ErrFull)
	third := b.send(3)
	want(t, b.send(4), ErrFull)
	b.answer <- nil
	b.expect(t, 1, 2, 3)
	more := b.send(4, 5, 6, 7) // alone it may be larger: it would never be taken otherwise
	b.answer <- nil
	b.expect(t, 4, 5, 6, 7)
	b.answer <- nil
	for _, done := range []<-chan error{first, second, third, more} {
		want(t, done, nil)
	}
}

func TestContext(t *testing.T) {
	b := stepped(Options[int]{Waiting: 2})
	first := b.send(0)
	b.expect(t, 0)
	ctx, cancel := context.WithCancel(t.Context())
	withdrawn := b.sendWith(ctx, 1)
	kept := b.send(2)
	cancel()
	want(t, withdrawn, context.Canceled)
	third := b.send(3) // there is room again
	b.answer <- nil
	b.expect(t, 2, 3)

	ctx, cancel = context.WithCancel(t.Context())
	underWay := b.sendWith(ctx, 4)
	b.answer <- nil
	b.expect(t, 4)
	cancel()
	want(t, underWay, context.Canceled) // what has begun goes on, without its caller
	b.answer <- nil
	for _, done := range []<-chan error{first, kept, third} {
		want(t, done, nil)
	}
	b.Close()
}

func TestTimeout(t *testing.T) {
	c := New(Options[int]{
		Commit: func(ctx context.Context, _ []int) error { <-ctx.Done(); return ctx.Err() },
		Batch:  1, InFlight: 1, Waiting: 1, Timeout: time.Millisecond,
	})
	if err := c.Commit(t.Context(), 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("answered %v", err)
	}
}

func TestAlone(t *testing.T) {
	culprit, other := errors.New("item 2 is wrong"), errors.New("away")
	b := stepped(Options[int]{Alone: func(err error) bool { return errors.Is(err, culprit) }})
	first := b.send(0)
	b.expect(t, 0)
	good, bad, also := b.send(1), b.send(2, 3), b.send(4)
	b.answer <- nil
	b.expect(t, 1, 2, 3, 4)
	b.answer <- culprit
	for _, batch := range [][]int{{1}, {2, 3}, {4}} {
		b.expect(t, batch...)
		if batch[0] == 2 {
			b.answer <- culprit
		} else {
			b.answer <- nil
		}
	}
	want(t, first, nil)
	want(t, good, nil)
	want(t, bad, culprit)
	want(t, also, nil)

	// The error of a lone call is its own, and one that is nobody's fault is everybody's.
	alone := b.send(5)
	b.expect(t, 5)
	two, three := b.send(6), b.send(7)
	b.answer <- culprit
	want(t, alone, culprit)
	b.expect(t, 6, 7)
	b.answer <- other
	want(t, two, other)
	want(t, three, other)
}

func TestClose(t *testing.T) {
	b := stepped(Options[int]{})
	first := b.send(1)
	b.expect(t, 1)
	second := b.send(2)
	closed := make(chan struct{})
	go func() { b.Close(); close(closed) }()
	for {
		b.mu.Lock()
		stopped := b.closed
		b.mu.Unlock()
		if stopped {
			break
		}
	}
	if err := b.Commit(t.Context(), 3); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	b.answer <- nil
	b.expect(t, 2) // what was taken before is committed
	select {
	case <-closed:
		t.Error("closed while a batch is under way")
	default:
	}
	b.answer <- nil
	<-closed
	want(t, first, nil)
	want(t, second, nil)
	b.Close()
}

// TestLinger: with commits that take 40 ms, when each batch begins and what is in it.
func TestLinger(t *testing.T) {
	const commit = 40 * time.Millisecond
	type batch struct {
		at    time.Duration
		items int
	}
	type caller struct{ first, again time.Duration } // when it comes, and how long after its answer once more; 0: not
	at := func(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
	eight := slices.Repeat([]caller{{at(1), 0}}, 8)
	coming := func(again ...float64) []caller {
		callers := append([]caller{{0, 0}}, slices.Clone(eight)...)
		for i, ms := range again {
			callers[i+1].again = at(ms)
		}
		return callers
	}
	for _, c := range []struct {
		name    string
		linger  time.Duration
		callers []caller
		want    []batch
	}{
		{"a lone caller is never waited with", at(2), []caller{{0, at(0.1)}}, []batch{{0, 1}, {at(40.1), 1}}},
		{"who comes back alone waits the linger", at(2), coming(0.5), []batch{{0, 1}, {at(40), 8}, {at(82.5), 1}}},
		{"or a quarter of a commit, if that is shorter", at(30), coming(0.5), []batch{{0, 1}, {at(40), 8}, {at(90.5), 1}}},
		{"or until three quarters are back", at(30), coming(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), []batch{{0, 1}, {at(40), 8}, {at(80.6), 6}, {at(130.6), 2}}},
		{"who comes later than a commit takes does not wait", at(2), coming(41), []batch{{0, 1}, {at(40), 8}, {at(121), 1}}},
		{"without it nobody waits", 0, coming(0.5), []batch{{0, 1}, {at(40), 8}, {at(80.5), 1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var got []batch
				g := New(Options[int]{
					Commit: func(_ context.Context, items []int) error {
						got = append(got, batch{time.Since(start), len(items)})
						time.Sleep(commit)
						return nil
					},
					Batch: 100, InFlight: 1, Waiting: 100, Timeout: time.Minute, Linger: c.linger,
				})
				var callers sync.WaitGroup
				for _, caller := range c.callers {
					callers.Go(func() {
						time.Sleep(caller.first)
						_ = g.Commit(t.Context(), 1)
						if caller.again > 0 {
							time.Sleep(caller.again)
							_ = g.Commit(t.Context(), 1)
						}
					})
				}
				callers.Wait()
				g.Close()
				if !slices.Equal(got, c.want) {
					t.Errorf("batches %v, want %v", got, c.want)
				}
			})
		})
	}
}

// TestEveryItemOnce: of many callers, some of whom give up and some of whom bring a bad item, each item that was
// answered with nil was committed once, and each that was not taken never.
func TestEveryItemOnce(t *testing.T) {
	for _, linger := range []time.Duration{0, time.Millisecond} {
		t.Run(fmt.Sprint("linger ", linger), func(t *testing.T) { everyItemOnce(t, linger) })
	}
}

func everyItemOnce(t *testing.T, linger time.Duration) {
	errBad := errors.New("bad")
	var mu sync.Mutex
	committed := map[int]int{}
	var running, most atomic.Int64
	c := New(Options[int]{
		Commit: func(_ context.Context, batch []int) error {
			if n := running.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer running.Add(-1)
			if slices.ContainsFunc(batch, func(n int) bool { return n%97 == 0 }) {
				return errBad
			}
			mu.Lock()
			defer mu.Unlock()
			for _, n := range batch {
				committed[n]++
			}
			return nil
		},
		Batch: 20, InFlight: 3, Waiting: 40, Timeout: time.Minute, Linger: linger,
		Alone: func(err error) bool { return errors.Is(err, errBad) },
	})
	var callers sync.WaitGroup
	var full atomic.Int64
	for caller := range 64 {
		callers.Go(func() {
			for i := range 200 {
				ctx, cancel := context.WithCancel(context.Background())
				if rand.N(10) == 0 {
					cancel()
				}
				first := (caller*200 + i) * 3
				items := []int{first, first + 1, first + 2}
				err := c.Commit(ctx, items...)
				cancel()
				mu.Lock()
				for _, n := range items {
					switch times := committed[n]; {
					case err == nil && times != 1, times > 1, times > 0 && (errors.Is(err, ErrFull) || errors.Is(err, errBad)):
						t.Errorf("item %d was committed %d times and answered %v", n, times, err)
					}
				}
				mu.Unlock()
				bad := slices.ContainsFunc(items, func(n int) bool { return n%97 == 0 })
				if errors.Is(err, ErrFull) {
					full.Add(1)
				} else if bad && err == nil || !bad && errors.Is(err, errBad) {
					t.Errorf("%v: answered %v", items, err)
				}
			}
		})
	}
	callers.Wait()
	c.Close()
	if most.Load() > 3 {
		t.Errorf("%d batches under way at once", most.Load())
	}
	if c.waiting != 0 || len(c.queue) != 0 {
		t.Errorf("%d items wait after all", c.waiting)
	}
	t.Logf("%d calls were told that it is full", full.Load())
}

func BenchmarkCommit(b *testing.B) {
	for _, callers := range []int{1, 50} {
		b.Run(fmt.Sprint(callers, " callers"), func(b *testing.B) {
			c := New(Options[int]{
				Commit: func(context.Context, []int) error { return nil },
				Batch:  500, InFlight: 4, Waiting: 5000, Timeout: time.Second,
			})
			b.ReportAllocs()
			b.SetParallelism(callers)
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					if err := c.Commit(context.Background(), 1); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}
