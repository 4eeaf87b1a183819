package counts_test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
	"isobar.dev/counts"
	"isobar.dev/events"
)

func TestMain(m *testing.M) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	err := local.Install(ctx, os.Stderr, local.RedisKind, local.ValkeyKind)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// kind is a kind of store.
type kind struct {
	name  string
	start func(dir string, port int, options ...local.Option) *local.Process
}

var kinds = []kind{{"redis", local.Redis}, {"valkey", local.Valkey}}

// both runs a test against each kind.
func both[T interface {
	testing.TB
	Run(string, func(T)) bool
}](t T, test func(T, kind)) {
	for _, k := range kinds {
		t.Run(k.name, func(t T) { test(t, k) })
	}
}

// server is a real server that ends with the test.
func (k kind) server(t testing.TB, options ...local.Option) *local.Process {
	t.Helper()
	p := k.start(t.TempDir(), 0, options...)
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
	must(t, p.Start(within(t, 30*time.Second)))
	return p
}

// open opens the store at an address for a day's window.
func (k kind) open(t testing.TB, addr string) counts.Store {
	t.Helper()
	return k.openWith(t, counts.Settings{Addr: addr}, 24*time.Hour)
}

func (k kind) openWith(t testing.TB, s counts.Settings, window time.Duration) counts.Store {
	t.Helper()
	store, err := counts.Open(k.name, s, window)
	must(t, err)
	t.Cleanup(store.Close)
	return store
}

// look is a client to look at what is in a store.
func look(t testing.TB, addr string) *redis.Client {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: addr, Protocol: 2})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	countries = []string{"GT", "ESP", "DE", "FR", "USA", "JP", "BR", "ZA", "IN", "AUS"}
	weathers  = []string{"Sunny", "Rainy", "Cloudy", "Windy", "Snowy"}
)

// arrival is the nth of a series.
func arrival(series string, n int) events.Arrival {
	return events.Arrival{
		Source: events.DefaultSource,
		ID:     fmt.Sprintf("%s-0198b0c4-7e5a-7000-8000-%012d", series, n),
		Report: events.Report{Country: countries[n%len(countries)], Weather: weathers[n%7%len(weathers)]},
	}
}

// arrivals are those from the nth on.
func arrivals(series string, from, n int) []events.Arrival {
	all := make([]events.Arrival, n)
	for i := range all {
		all[i] = arrival(series, from+i)
	}
	return all
}
