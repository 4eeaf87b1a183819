package peer

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLog(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })

	// step is what the peer's user tells, after so long, and what the log then says, if anything.
	type step struct {
		after time.Duration
		error string // none: it is back
		says  string
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"a peer that works from the start is not mentioned", []step{{0, "", ""}, {time.Hour, "", ""}}},
		{"why it is away is said once, and that it is back", []step{
			{0, "refused", "is away, trying again until it is back"},
			{time.Second, "refused", ""},
			{time.Second, "", `"is back" peer="the peer" after=2s`},
			{time.Second, "", ""},
			{time.Second, "refused", "is away, trying again until it is back"},
		}},
		{"another reason is said too, once however they alternate", []step{
			{0, "refused", "error=refused"},
			{time.Second, "wrong password", `"is still away" peer="the peer" for=1s error="wrong password"`},
			{time.Second, "refused", ""},
			{time.Second, "wrong password", ""},
		}},
		{"other numbers are no other reason", []step{
			{0, "read 127.0.0.1:4711->127.0.0.1:9092: reset", "reset"},
			{time.Second, "read 127.0.0.1:12345->127.0.0.1:9092: reset", ""},
		}},
		{"every 30 s it is said again", []step{
			{0, "refused", "refused"},
			{29 * time.Second, "refused", ""},
			{time.Second, "refused", `"is still away" peer="the peer" for=30s error=refused`},
			{29 * time.Second, "refused", ""},
			{time.Second, "refused", "for=1m0s"},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := Log{Peer: "the peer"}
				for i, s := range c.steps {
					time.Sleep(s.after)
					log.Reset()
					if s.error == "" {
						l.Back()
					} else {
						l.Away(errors.New(s.error))
					}
					if said := log.String(); !strings.Contains(said, s.says) || (said == "") != (s.says == "") {
						t.Errorf("step %d: it says %q, not %q", i, said, s.says)
					}
					if err := l.Err(); (err == nil) != (s.error == "") || err != nil && err.Error() != s.error {
						t.Errorf("step %d: its error is %v, not %q", i, err, s.error)
					}
				}
			})
		})
	}
}
