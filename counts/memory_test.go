package counts_test

import (
	"context"
	"strconv"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
)

// A set's table doubles as it grows, so what an id costs depends on how many there are: the sizes are on both sides of
// such a step.
func TestARememberedIDCostsAtMost72Bytes(t *testing.T) {
	const most = 72
	both(t, func(t *testing.T, k kind) {
		// Without the append-only file, whose buffers would be counted too.
		p := k.server(t, local.Config("appendonly no"))
		store, c := k.open(t, p.Addr()), look(t, p.Addr())
		must(t, store.Count(t.Context(), arrivals("first", 0, len(countries)*7)))
		must(t, c.Del(t.Context(), "messages:seen:1").Err())
		before := usedMemory(t, c)
		n := 0
		for _, size := range []int{200_000, 262_000, 263_000, 300_000} {
			for ; n < size; n += 1000 {
				must(t, store.Count(t.Context(), arrivals("memory", n, 1000)))
			}
			used := float64(usedMemory(t, c)-before) / float64(n)
			key, err := c.MemoryUsage(t.Context(), "messages:seen:1", 0).Result()
			must(t, err)
			t.Logf("%d ids: %.1f bytes each of used_memory, %.1f of MEMORY USAGE", n, used, float64(key)/float64(n))
			if used > most {
				t.Errorf("an id costs %.1f bytes, more than %d", used, most)
			}
		}
	})
}

func usedMemory(t *testing.T, c *redis.Client) int {
	t.Helper()
	info, err := c.Info(context.Background(), "memory").Result()
	must(t, err)
	_, rest, _ := strings.Cut(info, "used_memory:")
	digits, _, _ := strings.Cut(rest, "\r")
	n, err := strconv.Atoi(digits)
	must(t, err)
	return n
}
