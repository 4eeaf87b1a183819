package counts

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"isobar.dev/events"
)

// The keys that people read.
const (
	countryCounts = "country:counts"
	weatherCounts = "weather:counts"
	messagesTotal = "messages:total"
)

// sets is how many there are for remembering. Five are in use at most while nothing unusual happens; the others are for
// a window that is changed and for a clock that jumps.
const sets = 7

// idSize is how many bytes of the SHA-256 of an event's source and id are remembered. With the two that the store adds
// they are 16, the size that its allocator gives; two more would take 32. Among ten billion ids, two are the same in 14
// bytes with a probability of 1 to 10^14.
const idSize = 14

//go:embed count.lua
var script string

var (
	scriptSHA1 = func() string {
		sum := sha1.Sum([]byte(script))
		return hex.EncodeToString(sum[:])
	}()
	scriptKeys = func() []any {
		keys := []any{countryCounts, weatherCounts, messagesTotal, "messages:seen:until"}
		for i := range sets {
			keys = append(keys, fmt.Sprintf("messages:seen:%d", i+1))
		}
		return append([]any{len(keys)}, keys...)
	}()
)

const (
	// dialTimeout and answerTimeout bound one attempt, replicaTimeout the wait for replicas in it.
	dialTimeout    = 2 * time.Second
	answerTimeout  = 4 * time.Second
	replicaTimeout = time.Second
)

// server is a Store in Redis or Valkey.
type server struct {
	client   redis.UniversalClient
	settings Settings
	name     string // "redis"
	prefix   string // of the variables: "REDIS_"
	window   string // milliseconds
	health   health
}

var _ Store = (*server)(nil)

// silent drops the library's own log, which has a line for every attempt: what matters of it is in errors and in health.
type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

func init() { redis.SetLogger(silent{}) }

// Open returns the store of the given name, "redis" or "valkey", that remembers ids for the window, at least a second.
// The upper case of the name begins the variables that errors advise about. The store need not be there yet. The error
// names the variable that is wrong.
func Open(name string, s Settings, window time.Duration) (Store, error) {
	prefix := variablePrefix(name)
	if window < time.Second || window > 366*24*time.Hour {
		return nil, fmt.Errorf("DEDUPE_WINDOW must be between 1s and 8784h, not %v", window)
	}
	options, err := s.options(prefix)
	if err != nil {
		return nil, err
	}
	return &server{
		client:   redis.NewUniversalClient(options),
		settings: s,
		name:     name,
		prefix:   prefix,
		window:   strconv.FormatInt(window.Milliseconds(), 10),
		health:   newHealth(name),
	}, nil
}

func (s *server) Close() { _ = s.client.Close() }

// call holds what a script call needs, for the next one to use again.
type call struct {
	args               []any
	ids, places        []byte
	countries, weather dictionary
	hashed             []byte
}

var calls = sync.Pool{New: func() any {
	return &call{countries: dictionary{number: map[string]uint16{}}, weather: dictionary{number: map[string]uint16{}}}
}}

// dictionary numbers different words by their order.
type dictionary struct {
	number map[string]uint16
	words  []string
}

func (d *dictionary) add(word string) uint16 {
	n, known := d.number[word]
	if !known {
		n = uint16(len(d.words))
		d.number[word] = n
		d.words = append(d.words, word)
	}
	return n
}

func (d *dictionary) reset() {
	clear(d.number)
	clear(d.words)
	d.words = d.words[:0]
}

// maxCall is the most reports in one script call: their number must go into a dictionary, and the store does nothing
// else meanwhile.
const maxCall = 10_000

// Count implements Store.
func (s *server) Count(ctx context.Context, arrivals []events.Arrival) error {
	for len(arrivals) > 0 {
		n := min(len(arrivals), maxCall)
		if err := s.count(ctx, arrivals[:n]); err != nil {
			return s.health.note(s.failure(err))
		}
		arrivals = arrivals[n:]
	}
	return s.health.note(nil)
}

func (s *server) count(ctx context.Context, arrivals []events.Arrival) error {
	c := calls.Get().(*call)
	defer calls.Put(c)
	args := c.build(arrivals, s.window, s.settings.MinReplicas > 0)
	args[0], args[1] = "evalsha", scriptSHA1
	err := s.run(ctx, args)
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		args[0], args[1] = "eval", script
		err = s.run(ctx, args)
	}
	return err
}

// build returns the arguments of the script call but for the first two. The ids and places go as one string each: the
// store need not read ten thousand arguments, nor this program make them.
func (c *call) build(arrivals []events.Arrival, window string, confirm bool) []any {
	c.ids, c.places = c.ids[:0], c.places[:0]
	c.countries.reset()
	c.weather.reset()
	for i := range arrivals {
		a := &arrivals[i]
		c.hashed = binary.AppendUvarint(c.hashed[:0], uint64(len(a.Source)))
		c.hashed = append(c.hashed, a.Source...)
		c.hashed = append(c.hashed, a.ID...)
		sum := sha256.Sum256(c.hashed)
		c.ids = append(c.ids, sum[:idSize]...)
		c.places = binary.BigEndian.AppendUint16(c.places, c.countries.add(a.Report.Country))
		c.places = binary.BigEndian.AppendUint16(c.places, c.weather.add(a.Report.Weather))
	}
	must := "0"
	if confirm {
		must = "1"
	}
	args := c.args[:0]
	args = append(args, nil, nil)
	args = append(args, scriptKeys...)
	args = append(args, window, must, c.ids, c.places, len(c.countries.words))
	for _, country := range c.countries.words {
		args = append(args, country)
	}
	for _, weather := range c.weather.words {
		args = append(args, weather)
	}
	c.args = args
	return args
}

// run calls the script once. go-redis may send it again after an error or a timeout when the first call did its work:
// the second then finds the ids known and changes nothing.
func (s *server) run(ctx context.Context, args []any) error {
	if s.settings.MinReplicas == 0 {
		return s.client.Do(ctx, args...).Err()
	}
	pipe := s.client.Pipeline()
	counted := pipe.Do(ctx, args...)
	replicas := pipe.Do(ctx, "wait", s.settings.MinReplicas, replicaTimeout.Milliseconds())
	_, _ = pipe.Exec(ctx) // its error is that of one of the two
	if err := counted.Err(); err != nil {
		return err
	}
	n, err := replicas.Int()
	if err == nil && n < s.settings.MinReplicas {
		err = &tooFewReplicas{n, s.settings.MinReplicas}
	}
	return err
}

// tooFewReplicas is the error for what is counted but has not reached as many replicas as it must.
type tooFewReplicas struct{ got, want int }

func (e *tooFewReplicas) Error() string {
	return fmt.Sprintf("%d of at least %d replicas have confirmed within %v", e.got, e.want, replicaTimeout)
}
