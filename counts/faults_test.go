package counts_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"isobar.dev/config/local"
	"isobar.dev/counts"
	"isobar.dev/events"
)

// senders sends batches of 50 reports from eight goroutines through a store, each again and again until it is counted,
// and tells of every batch that is. It returns what must be counted in the end and a function that waits for that.
func senders(t *testing.T, store counts.Store, batches int) (sent []events.Arrival, counted *atomic.Int64, wait func()) {
	t.Helper()
	const size = 50
	var next, failed atomic.Int64
	counted = new(atomic.Int64)
	var running sync.WaitGroup
	ctx := within(t, time.Minute)
	for range 8 {
		running.Go(func() {
			for {
				n := int(next.Add(1)) - 1
				if n >= batches {
					return
				}
				for {
					err := store.Count(ctx, arrivals("fault", n*size, size))
					if err == nil {
						break
					}
					failed.Add(1)
					if ctx.Err() != nil {
						t.Errorf("batch %d was never counted: %v", n, err)
						return
					}
					time.Sleep(2 * time.Millisecond) // as a source does before it resends
				}
				counted.Add(1)
			}
		})
	}
	return arrivals("fault", 0, batches*size), counted, func() {
		running.Wait()
		t.Logf("%d calls failed", failed.Load())
	}
}

func TestCountsEachReportOnceThoughTheStoreIsKilledWhileItWrites(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t)
		store := k.open(t, p.Addr())
		sent, counted, wait := senders(t, store, 600)
		for kills := int64(1); kills <= 3; kills++ {
			await(t, 30*time.Second, "batches are counted", func() bool { return counted.Load() >= kills*100 })
			must(t, p.Kill())
			must(t, p.Start(within(t, 30*time.Second)))
		}
		wait()
		expect(t, look(t, p.Addr()), sum(sent))
	})
}

func TestCountsEachReportOnceThoughTheStoreStandsStill(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t)
		store := k.open(t, p.Addr())
		must(t, store.Count(t.Context(), arrivals("first", 0, 10)))
		must(t, p.Pause())
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		err := store.Count(ctx, arrivals("still", 0, 100))
		fails(t, err, false)
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("it took %v to say so", took)
		}
		must(t, p.Resume())
		must(t, store.Count(t.Context(), arrivals("still", 0, 100)))
		expect(t, look(t, p.Addr()), sum(arrivals("first", 0, 10), arrivals("still", 0, 100)))
	})
}

func TestAnAttemptEndsThoughNobodyEndsIt(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it waits for the longest time that an answer may take")
	}
	both(t, func(t *testing.T, k kind) {
		t.Parallel()
		p := k.server(t)
		store := k.open(t, p.Addr())
		must(t, store.Count(t.Context(), arrivals("first", 0, 10)))
		must(t, p.Pause())
		defer func() { must(t, p.Resume()) }()
		start := time.Now()
		fails(t, store.Count(context.Background(), arrivals("still", 0, 100)), false)
		if took := time.Since(start); took > 15*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestCountsEachReportOnceThoughConnectionsAreCut(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t)
		w := newWire(t, p.Addr())
		sent, counted, wait := senders(t, k.open(t, w.addr()), 600)
		for cuts := int64(1); cuts <= 20; cuts++ {
			await(t, 30*time.Second, "batches are counted", func() bool { return counted.Load() >= cuts*20 })
			w.cut()
		}
		wait()
		expect(t, look(t, p.Addr()), sum(sent))
	})
}

func TestCountsOnceWhatWasCountedWithoutAnAnswer(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t)
		w := newWire(t, p.Addr())
		store := k.open(t, w.addr())
		must(t, store.Count(t.Context(), arrivals("first", 0, 10)))
		w.deafen(true)
		answer := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { answer <- store.Count(ctx, arrivals("unanswered", 0, 100)) }()
		<-w.asked
		c := look(t, p.Addr())
		expect(t, c, sum(arrivals("first", 0, 10), arrivals("unanswered", 0, 100)))
		w.deafen(false)
		w.cut()
		// The store's own second attempt may have found it counted; if not, the caller sends it again.
		if err := <-answer; err != nil {
			must(t, store.Count(t.Context(), arrivals("unanswered", 0, 100)))
		}
		expect(t, c, sum(arrivals("first", 0, 10), arrivals("unanswered", 0, 100)))
	})
}

func TestAStoreThatIsAwayIsWaitedFor(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t)
		must(t, p.Kill())
		store := k.open(t, p.Addr())
		if got := store.Status(); got != "not asked yet" {
			t.Error(got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var watching sync.WaitGroup
		watching.Go(func() { store.Watch(ctx) })
		defer watching.Wait()
		defer cancel()
		status := func(word string) func() bool {
			return func() bool { return strings.Contains(store.Status(), word) }
		}
		await(t, 10*time.Second, "it says that the store is away", status("does not count since"))
		start := time.Now()
		fails(t, store.Count(t.Context(), arrivals("a", 0, 10)), false, "refused")
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("it took %v to say that nobody is there", took)
		}
		must(t, p.Start(within(t, 30*time.Second)))
		await(t, 10*time.Second, "it says that the store is there", status("answers"))
		must(t, store.Count(t.Context(), arrivals("a", 0, 10)))
		must(t, p.Kill())
		fails(t, store.Count(t.Context(), arrivals("b", 0, 10)), false)
		must(t, p.Start(within(t, 30*time.Second)))
		await(t, 10*time.Second, "it says so again, with nobody counting", status("answers"))
		must(t, store.Count(t.Context(), arrivals("b", 0, 10)))
		expect(t, look(t, p.Addr()), sum(arrivals("a", 0, 10), arrivals("b", 0, 10)))
	})
}

// replica starts a replica of a primary and returns when it follows.
func (k kind) replica(t *testing.T, primary *local.Process, options ...local.Option) *local.Process {
	t.Helper()
	r := k.server(t, append([]local.Option{quick, local.ReplicaOf(primary.Addr())}, options...)...)
	c := look(t, r.Addr())
	await(t, 30*time.Second, "the replica follows", func() bool {
		info, err := c.Info(t.Context(), "replication").Result()
		return err == nil && strings.Contains(info, "master_link_status:up")
	})
	return r
}

// quick makes a primary send its data to a new replica at once.
var quick = local.Config("repl-diskless-sync-delay 0")

func TestGoesOnWhereAnotherServerTakesOverTheAddress(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		a := k.server(t, quick)
		b := k.replica(t, a)
		w := newWire(t, a.Addr())
		store := k.openWith(t, counts.Settings{Addr: w.addr(), MinReplicas: 1}, time.Hour)
		must(t, store.Count(t.Context(), arrivals("a", 0, 100)))
		// The address now leads to b, and connections to a are still open: a becomes the replica.
		ca, cb := look(t, a.Addr()), look(t, b.Addr())
		must(t, cb.Do(t.Context(), "replicaof", "no", "one").Err())
		host, port, _ := strings.Cut(b.Addr(), ":")
		must(t, ca.Do(t.Context(), "replicaof", host, port).Err())
		fails(t, store.Count(t.Context(), arrivals("b", 0, 100)), false, "READONLY")
		w.lead(b.Addr())
		await(t, 30*time.Second, "it counts in the other server", func() bool {
			return store.Count(t.Context(), arrivals("b", 0, 100)) == nil
		})
		expect(t, cb, sum(arrivals("a", 0, 100), arrivals("b", 0, 100)))
	})
}

func TestWhatIsCountedIsOnTheReplicasItMustBeOn(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, k kind) {
		t.Parallel()
		primary := k.server(t, quick)
		c := look(t, primary.Addr())
		settings := counts.Settings{Addr: primary.Addr(), MinReplicas: 1}
		few := "0 of at least 1 replicas"
		fails(t, k.openWith(t, settings, time.Hour).Count(t.Context(), arrivals("a", 0, 10)), false, few)
		// All are known now, and a resend on another connection has nothing to write: still it must not pass.
		fails(t, k.openWith(t, settings, time.Hour).Count(t.Context(), arrivals("a", 0, 10)), false, few)

		replica := k.replica(t, primary)
		store := k.openWith(t, settings, time.Hour)
		must(t, store.Count(t.Context(), arrivals("a", 0, 10)))
		expect(t, look(t, replica.Addr()), sum(arrivals("a", 0, 10)))

		must(t, replica.Pause())
		fails(t, store.Count(t.Context(), arrivals("b", 0, 10)), false, few)
		fails(t, k.openWith(t, settings, time.Hour).Count(t.Context(), arrivals("b", 0, 10)), false, few)
		must(t, replica.Resume())
		await(t, 30*time.Second, "the replica confirms again", func() bool {
			return store.Count(t.Context(), arrivals("b", 0, 10)) == nil
		})
		want := sum(arrivals("a", 0, 10), arrivals("b", 0, 10))
		expect(t, c, want)
		expect(t, look(t, replica.Addr()), want)
	})
}

func TestCountsEachReportOnceThoughAReplicaTakesThePlaceOfTheKilledPrimary(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, k kind) {
		t.Parallel()
		primary := k.server(t, quick)
		replica := k.replica(t, primary)
		w := newWire(t, primary.Addr())
		store := k.openWith(t, counts.Settings{Addr: w.addr(), MinReplicas: 1}, time.Hour)
		sent := arrivals("failover", 0, 20_000)
		var answered sync.Map
		var n atomic.Int64
		var senders sync.WaitGroup
		for i := range 8 {
			senders.Go(func() {
				for from := i * 100; from < len(sent); from += 800 {
					if store.Count(t.Context(), sent[from:from+100]) != nil {
						return
					}
					answered.Store(from, true)
					n.Add(1)
				}
			})
		}
		await(t, 30*time.Second, "some are counted", func() bool { return n.Load() > 20 })
		must(t, primary.Kill())
		c := look(t, replica.Addr())
		must(t, c.Do(t.Context(), "replicaof", "no", "one").Err())
		w.lead(replica.Addr())
		senders.Wait()
		k.replica(t, replica, local.Named("second")) // what must be on a replica needs one
		t.Logf("%d of 200 batches were answered before", n.Load())
		for from := 0; from < len(sent); from += 100 {
			if _, done := answered.Load(from); !done {
				await(t, 30*time.Second, "what was not answered is counted", func() bool {
					return store.Count(t.Context(), sent[from:from+100]) == nil
				})
			}
		}
		expect(t, c, sum(sent))
	})
}

func TestFollowsSentinelToAnotherPrimary(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, k kind) {
		t.Parallel()
		primary := k.server(t, quick)
		replica := k.replica(t, primary)
		sentinel := local.Sentinel(t.TempDir(), 0, "counts", primary.Addr())
		t.Cleanup(func() { must(t, sentinel.Kill()) })
		must(t, sentinel.Start(within(t, 30*time.Second)))
		cs := look(t, sentinel.Addr())
		await(t, 30*time.Second, "the Sentinel knows the replica", func() bool {
			list, err := cs.Do(t.Context(), "sentinel", "replicas", "counts").Slice()
			return err == nil && len(list) == 1 && strings.Contains(fmt.Sprint(list...), "master-link-status ok")
		})
		store := k.openWith(t, counts.Settings{SentinelAddrs: []string{sentinel.Addr()}, SentinelMaster: "counts"}, time.Hour)
		must(t, store.Count(t.Context(), arrivals("before", 0, 100)))
		c := look(t, replica.Addr())
		await(t, 10*time.Second, "the replica has it", func() bool { return holds(t, c).total == 100 })
		must(t, primary.Kill())
		var last error
		await(t, 60*time.Second, "it counts in the new primary", func() bool {
			last = store.Count(t.Context(), arrivals("after", 0, 100))
			return last == nil
		})
		expect(t, c, sum(arrivals("before", 0, 100), arrivals("after", 0, 100)))
	})
}

func TestSaysWhichSentinelSettingsMayBeWrong(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t)
		sentinel := local.Sentinel(t.TempDir(), 0, "counts", p.Addr())
		t.Cleanup(func() { must(t, sentinel.Kill()) })
		must(t, sentinel.Start(within(t, 30*time.Second)))
		s := counts.Settings{SentinelAddrs: []string{sentinel.Addr()}, SentinelMaster: "other"}
		prefix := strings.ToUpper(k.name)
		err := k.openWith(t, s, time.Hour).Count(t.Context(), arrivals("a", 0, 1))
		fails(t, err, false, prefix+"_SENTINEL_ADDRS", prefix+"_SENTINEL_MASTER")
	})
}
