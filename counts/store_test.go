package counts_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
	"isobar.dev/counts"
	"isobar.dev/events"
)

// held is what a store holds for people.
type held struct {
	countries, weathers map[string]int
	total               int
}

func holds(t testing.TB, c *redis.Client) held {
	t.Helper()
	total, err := c.Get(t.Context(), "messages:total").Int()
	if err != nil && !errors.Is(err, redis.Nil) {
		t.Fatal(err)
	}
	numbers := func(key string) map[string]int {
		fields, err := c.HGetAll(t.Context(), key).Result()
		must(t, err)
		all := map[string]int{}
		for field, value := range fields {
			all[field], err = strconv.Atoi(value)
			must(t, err)
		}
		return all
	}
	return held{numbers("country:counts"), numbers("weather:counts"), total}
}

// sum is what a store must hold after these, each counted once.
func sum(all ...[]events.Arrival) held {
	h := held{map[string]int{}, map[string]int{}, 0}
	for _, some := range all {
		for _, a := range some {
			h.countries[a.Report.Country]++
			h.weathers[a.Report.Weather]++
			h.total++
		}
	}
	return h
}

func (h held) equal(other held) bool {
	return h.total == other.total && maps.Equal(h.countries, other.countries) && maps.Equal(h.weathers, other.weathers)
}

func expect(t testing.TB, c *redis.Client, want held) {
	t.Helper()
	if got := holds(t, c); !got.equal(want) {
		t.Errorf("the store holds\n%v, not\n%v", got, want)
	}
}

// fails requires a *Failure that says all of the words.
func fails(t testing.TB, err error, lasting bool, words ...string) {
	t.Helper()
	f, ok := errors.AsType[*counts.Failure](err)
	if !ok {
		t.Fatalf("the error is %T %v, not a *Failure", err, err)
	}
	if f.Lasting != lasting {
		t.Errorf("lasting is %v for %v", f.Lasting, err)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error does not say %q: %v", word, err)
		}
	}
}

// await asks until the condition holds; there is no event of it.
func await(t testing.TB, d time.Duration, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain: %s", d, what)
		}
	}
}

// fixture is a running server, empty, and a store in it.
type fixture struct {
	kind  kind
	addr  string
	store counts.Store
	c     *redis.Client
}

func report(source, id, country, weather string) events.Arrival {
	return events.Arrival{Source: source, ID: id, Report: events.Report{Country: country, Weather: weather}}
}

// seen are the sets in which ids are remembered and their time to live.
func (f fixture) seen(t testing.TB) map[string]time.Duration {
	t.Helper()
	all := map[string]time.Duration{}
	keys, err := f.c.Keys(t.Context(), "messages:seen:[0-9]*").Result()
	must(t, err)
	for _, key := range keys {
		all[key], err = f.c.PTTL(t.Context(), key).Result()
		must(t, err)
	}
	return all
}

// conformance is what every store does.
var conformance = []struct {
	name string
	test func(t *testing.T, f fixture)
}{
	{"counts a report under its country, its weather and in the total", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), []events.Arrival{report("s", "1", "GT", "Sunny")}))
		expect(t, f.c, held{map[string]int{"GT": 1}, map[string]int{"Sunny": 1}, 1})
	}},
	{"counts nothing when there is nothing to count", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), nil))
		expect(t, f.c, sum())
	}},
	{"counts an event that stands twice in a batch once, as it stands first", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), []events.Arrival{
			report("s", "1", "GT", "Sunny"), report("s", "2", "DE", "Rainy"), report("s", "1", "ES", "Windy"),
		}))
		expect(t, f.c, held{map[string]int{"GT": 1, "DE": 1}, map[string]int{"Sunny": 1, "Rainy": 1}, 2})
	}},
	{"counts of a batch only what it has not seen before", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 300)))
		must(t, f.store.Count(t.Context(), arrivals("a", 100, 300)))
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 400)))
		expect(t, f.c, sum(arrivals("a", 0, 400)))
	}},
	{"tells events apart by source and id together", func(t *testing.T, f fixture) {
		all := []events.Arrival{
			report("a", "bc", "GT", "Sunny"), report("ab", "c", "GT", "Sunny"), report("b", "bc", "GT", "Sunny"),
			report("a", "BC", "GT", "Sunny"), report("a", "bc ", "GT", "Sunny"), report("a", "b\x00c", "GT", "Sunny"),
		}
		for range 2 {
			must(t, f.store.Count(t.Context(), all))
		}
		expect(t, f.c, sum(all))
	}},
	{"counts a batch larger than what Lua unpacks, with as many weathers", func(t *testing.T, f fixture) {
		all := arrivals("large", 0, 25_000)
		for i := range all {
			all[i].Report.Weather = fmt.Sprint("weather ", i)
		}
		must(t, f.store.Count(t.Context(), all))
		must(t, f.store.Count(t.Context(), append(all[5000:25_000:25_000], all...)))
		expect(t, f.c, sum(all))
	}},
	{"keeps a weather as it was sent", func(t *testing.T, f fixture) {
		var all []events.Arrival
		for i, weather := range []string{"sunny", "Sunny", " Sunny ", "sol y sombra ☀", "a\nb", "\x00", "0", "-1", strings.Repeat("é", 32)} {
			all = append(all, report("s", fmt.Sprint(i), "GT", weather))
		}
		must(t, f.store.Count(t.Context(), all))
		expect(t, f.c, sum(all))
	}},
	{"counts once what eight send at the same time", func(t *testing.T, f fixture) {
		var senders sync.WaitGroup
		for i := range 8 {
			senders.Go(func() {
				for n := 0; n < 2000; n += 100 {
					from := (n + i*300) % 2000 // each in another order
					if err := f.store.Count(t.Context(), arrivals("same", from, 100)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		senders.Wait()
		expect(t, f.c, sum(arrivals("same", 0, 2000)))
	}},
	{"remembers an id for the window and at most a quarter longer", func(t *testing.T, f fixture) {
		store := f.kind.openWith(t, counts.Settings{Addr: f.addr}, 24*time.Hour)
		must(t, store.Count(t.Context(), arrivals("a", 0, 10)))
		for key, left := range f.seen(t) {
			if left < 24*time.Hour || left > 30*time.Hour {
				t.Errorf("%s lives for %v", key, left)
			}
		}
	}},
	{"forgets an id after the window, and keeps nothing of it", func(t *testing.T, f fixture) {
		store := f.kind.openWith(t, counts.Settings{Addr: f.addr}, time.Second)
		one := arrivals("a", 0, 1)
		start := time.Now()
		must(t, store.Count(t.Context(), one))
		await(t, 10*time.Second, "the id is forgotten", func() bool {
			must(t, store.Count(t.Context(), one))
			return holds(t, f.c).total == 2
		})
		if took := time.Since(start); took < time.Second {
			t.Errorf("it was remembered for %v only", took)
		}
		await(t, 10*time.Second, "all that is remembered expires", func() bool {
			keys, err := f.c.Keys(t.Context(), "messages:seen:*").Result()
			must(t, err)
			return len(keys) == 0
		})
	}},
	{"remembers through every change of sets", func(t *testing.T, f fixture) {
		store := f.kind.openWith(t, counts.Settings{Addr: f.addr}, 3*time.Second)
		var sent []events.Arrival
		used := map[string]bool{}
		for start := time.Now(); time.Since(start) < 1900*time.Millisecond; {
			sent = append(sent, arrival("a", len(sent)))
			must(t, store.Count(t.Context(), sent))
			for key := range f.seen(t) {
				used[key] = true
			}
		}
		if len(used) < 3 {
			t.Errorf("only %v were used", used)
		}
		expect(t, f.c, sum(sent))
	}},
	{"a longer window holds for what was counted before it was set", func(t *testing.T, f fixture) {
		must(t, f.kind.openWith(t, counts.Settings{Addr: f.addr}, time.Hour).Count(t.Context(), arrivals("a", 0, 10)))
		must(t, f.store.Count(t.Context(), arrivals("b", 0, 10)))
		for key, left := range f.seen(t) {
			if left < 24*time.Hour {
				t.Errorf("%s lives for %v only", key, left)
			}
		}
	}},
	{"a shorter window forgets nothing earlier that was counted before it was set", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 10)))
		short := f.kind.openWith(t, counts.Settings{Addr: f.addr}, time.Hour)
		must(t, short.Count(t.Context(), arrivals("b", 0, 10)))
		var day, hour int
		for _, left := range f.seen(t) {
			switch {
			case left > 23*time.Hour:
				day++
			case left < 2*time.Hour:
				hour++
			}
		}
		if day != 1 || hour != 1 {
			t.Errorf("the sets live for %v", f.seen(t))
		}
	}},
	{"two windows in turn let nothing live longer than the longer one", func(t *testing.T, f fixture) {
		short := f.kind.openWith(t, counts.Settings{Addr: f.addr}, time.Hour)
		for i := range 20 {
			must(t, short.Count(t.Context(), arrivals(fmt.Sprint("a", i), 0, 10)))
			must(t, f.store.Count(t.Context(), arrivals(fmt.Sprint("b", i), 0, 10)))
		}
		for key, left := range f.seen(t) {
			if left > 30*time.Hour {
				t.Errorf("%s lives for %v", key, left)
			}
		}
		if n := len(f.seen(t)); n > 3 {
			t.Errorf("%d sets were made", n)
		}
	}},
	{"forgets nothing when the store's clock jumps back", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 10)))
		// To the store it is the same as if its clock had been three days ahead until now.
		ahead := time.Now().Add(72 * time.Hour)
		must(t, f.c.HSet(t.Context(), "messages:seen:until", "1", ahead.Add(time.Hour).UnixMilli()).Err())
		must(t, f.c.PExpireAt(t.Context(), "messages:seen:1", ahead.Add(25*time.Hour)).Err())
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 20)))
		expect(t, f.c, sum(arrivals("a", 0, 20)))
		if n := len(f.seen(t)); n != 2 {
			t.Errorf("%d sets, not a second one beside that from the future", n)
		}
	}},
	{"counts and remembers when no set is free", func(t *testing.T, f fixture) {
		for i := 1; i <= 7; i++ {
			must(t, f.c.SAdd(t.Context(), fmt.Sprint("messages:seen:", i), "other").Err())
			must(t, f.c.Expire(t.Context(), fmt.Sprint("messages:seen:", i), time.Minute).Err())
		}
		for range 2 {
			must(t, f.store.Count(t.Context(), arrivals("a", 0, 20)))
		}
		expect(t, f.c, sum(arrivals("a", 0, 20)))
		longest := time.Duration(0)
		for _, left := range f.seen(t) {
			longest = max(longest, left)
		}
		if longest < 24*time.Hour {
			t.Errorf("it is remembered for %v only", longest)
		}
	}},
	{"goes on after everything is deleted", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 10)))
		must(t, f.c.FlushAll(t.Context()).Err())
		must(t, f.c.ScriptFlush(t.Context()).Err())
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 10)))
		expect(t, f.c, sum(arrivals("a", 0, 10)))
	}},
	{"counts each once while the script is deleted again and again", func(t *testing.T, f fixture) {
		for n := range 50 {
			must(t, f.c.ScriptFlush(t.Context()).Err())
			must(t, f.store.Count(t.Context(), arrivals("a", n*10, 20)))
		}
		expect(t, f.c, sum(arrivals("a", 0, 510)))
	}},
	{"counts nothing when a key holds something else, and goes on when it is gone", func(t *testing.T, f fixture) {
		for _, key := range []string{"country:counts", "weather:counts", "messages:total", "messages:seen:until", "messages:seen:1"} {
			must(t, f.c.FlushAll(t.Context()).Err())
			must(t, f.c.RPush(t.Context(), key, "a list").Err())
			err := f.store.Count(t.Context(), arrivals("a", 0, 10))
			fails(t, err, true, "WRONGTYPE", "rename or delete")
			must(t, f.c.Del(t.Context(), key).Err())
			expect(t, f.c, sum())
			must(t, f.store.Count(t.Context(), arrivals("a", 0, 10)))
			expect(t, f.c, sum(arrivals("a", 0, 10)))
		}
	}},
	{"counts nothing when a count is no number, and says which", func(t *testing.T, f fixture) {
		for name, breaks := range map[string]func() error{
			"field GT of country:counts holds many":   func() error { return f.c.HSet(t.Context(), "country:counts", "GT", "many").Err() },
			"field Sunny of weather:counts holds 1.5": func() error { return f.c.HSet(t.Context(), "weather:counts", "Sunny", "1.5").Err() },
			"messages:total holds 9223372036854775807": func() error {
				return f.c.Set(t.Context(), "messages:total", "9223372036854775807", 0).Err()
			},
		} {
			must(t, f.c.FlushAll(t.Context()).Err())
			must(t, f.store.Count(t.Context(), []events.Arrival{report("s", "0", "DE", "Rainy")}))
			before, err := f.c.HGetAll(t.Context(), "country:counts").Result()
			must(t, err)
			must(t, breaks())
			err = f.store.Count(t.Context(), []events.Arrival{report("s", "1", "DE", "Rainy"), report("s", "2", "GT", "Sunny")})
			fails(t, err, true, name)
			if fail, _ := errors.AsType[*counts.Failure](err); !fail.Contents {
				t.Errorf("%v is not said to be about the contents", err)
			}
			if after, _ := f.c.HGet(t.Context(), "country:counts", "DE").Result(); after != before["DE"] {
				t.Errorf("%s: DE was counted", name)
			}
		}
	}},
	{"counts nothing when memory is full, and goes on when there is some", func(t *testing.T, f fixture) {
		must(t, f.store.Count(t.Context(), arrivals("a", 0, 10)))
		must(t, f.c.ConfigSet(t.Context(), "maxmemory", "1mb").Err())
		err := f.store.Count(t.Context(), arrivals("b", 0, 1000))
		must(t, f.c.ConfigSet(t.Context(), "maxmemory", "0").Err())
		fails(t, err, false, "OOM", "DEDUPE_WINDOW")
		expect(t, f.c, sum(arrivals("a", 0, 10)))
		must(t, f.store.Count(t.Context(), arrivals("b", 0, 1000)))
		expect(t, f.c, sum(arrivals("a", 0, 10), arrivals("b", 0, 1000)))
	}},
	{"counts nothing without one of the rights it needs, and counts with just these", func(t *testing.T, f fixture) {
		prefix := strings.ToUpper(f.kind.name)
		full := strings.Fields("on >secret +ping +evalsha +eval +wait +time +pexpiretime +pexpireat +smismember +sadd +hmget +hset " +
			"+hincrby +get +incrby ~country:counts ~weather:counts ~messages:*")
		user := func(rules ...string) {
			must(t, f.c.ACLSetUser(t.Context(), "writer", append([]string{"reset"}, rules...)...).Err())
		}
		defer f.c.ACLDelUser(t.Context(), "writer")
		must(t, f.store.Count(t.Context(), arrivals("before", 0, 10))) // so that there is a set to look into
		settings := counts.Settings{Addr: f.addr, Username: "writer", Password: "secret"}
		for i, right := range full {
			if i < 2 || right == "+ping" || right == "+eval" || right == "+wait" {
				continue
			}
			less := append([]string{}, full[:i]...)
			user(append(less, full[i+1:]...)...)
			err := f.kind.openWith(t, settings, time.Hour).Count(t.Context(), arrivals("a", 0, 10))
			if err == nil {
				t.Errorf("it counts without %s", right)
				continue
			}
			fails(t, err, true, "must give this user +ping +evalsha")
			expect(t, f.c, sum(arrivals("before", 0, 10)))
		}
		user(full...)
		must(t, f.kind.openWith(t, settings, time.Hour).Count(t.Context(), arrivals("a", 0, 10)))
		expect(t, f.c, sum(arrivals("before", 0, 10), arrivals("a", 0, 10)))

		settings.Password = "wrong"
		fails(t, f.kind.openWith(t, settings, time.Hour).Count(t.Context(), arrivals("a", 0, 10)), true, prefix+"_PASSWORD is wrong, or "+prefix+"_USERNAME")
	}},
	{"says that a password is missing or wrong", func(t *testing.T, f fixture) {
		prefix := strings.ToUpper(f.kind.name)
		try := func(password string) error {
			s := counts.Settings{Addr: f.addr, Password: password}
			return f.kind.openWith(t, s, time.Hour).Count(t.Context(), arrivals("a", 0, 1))
		}
		must(t, f.c.ConfigSet(t.Context(), "requirepass", "secret").Err())
		defer func() { must(t, f.c.ConfigSet(t.Context(), "requirepass", "").Err()) }()
		fails(t, try(""), true, "set "+prefix+"_PASSWORD")
		fails(t, try("wrong"), true, prefix+"_PASSWORD is wrong")
		must(t, try("secret"))
	}},
	{"ends when its context does", func(t *testing.T, f fixture) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := f.store.Count(ctx, arrivals("a", 0, 10)); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}},
}

func TestStore(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		p := k.server(t, local.Config("appendfsync no"))
		for _, c := range conformance {
			t.Run(c.name, func(t *testing.T) {
				f := fixture{k, p.Addr(), k.open(t, p.Addr()), look(t, p.Addr())}
				must(t, f.c.FlushAll(t.Context()).Err())
				c.test(t, f)
			})
		}
	})
}
