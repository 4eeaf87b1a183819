package main

import (
	"bytes"
	"log/slog"
	"net"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"

	"isobar.dev/events/api"
	"isobar.dev/internal/authority"
)

func TestTLS(t *testing.T) {
	ours, other := authority.New(t), authority.New(t)
	serve := func(ip string, until time.Time) string {
		s := newService(t)
		var err error
		if s.creds, err = credentials.NewServerTLSFromFile(ours.Sign(t, ip, until)); err != nil {
			t.Fatal(err)
		}
		s.start(t)
		return s.addr
	}
	soon := time.Now().Add(time.Hour)
	secure := serve("127.0.0.1", soon)
	_, port, _ := net.SplitHostPort(secure)
	plain := newService(t)
	plain.start(t)

	t.Run("over TLS reports are published", func(t *testing.T) {
		p := openTLS(t, secure, settings{TLS: true, CAFile: ours.File}.secure(), 500)
		if err := p.publish(t.Context(), reports("tls-", 3)); err != nil {
			t.Error(err)
		}
		if state := p.peers()["publisher"]; state != "READY" {
			t.Errorf("its state is %q", state)
		}
	})
	t.Run("an authority that is renewed is known without a restart", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "ca.pem")
		other.Copy(t, file)
		p := openTLS(t, secure, settings{TLS: true, CAFile: file}.secure(), 500)
		if err := p.publish(t.Context(), reports("refused-", 1)); err == nil {
			t.Fatal("published to somebody unknown")
		}
		ours.Copy(t, file)
		await(t, "a report that is published", func() bool { return p.publish(t.Context(), reports("renewed-", 1)) == nil })
	})
	for _, c := range []struct {
		name, addr string
		settings   settings
		says       string
	}{
		{"another authority", secure, settings{TLS: true, CAFile: other.File}, "PUBLISHER_CA_FILE must hold the authority"},
		{"the system's authorities", secure, settings{TLS: true}, "PUBLISHER_CA_FILE must hold the authority"},
		{"another name", "localhost:" + port, settings{TLS: true, CAFile: ours.File}, "a name that its certificate holds"},
		{"an expired certificate", serve("127.0.0.1", time.Now().Add(-time.Hour)), settings{TLS: true, CAFile: ours.File}, "must be renewed"},
		{"TLS where there is none", plain.addr, settings{TLS: true, CAFile: ours.File}, "no TLS at this port: unset PUBLISHER_TLS"},
		{"no TLS where there is", secure, settings{}, "it may want PUBLISHER_TLS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log bytes.Buffer
			before := slog.Default()
			slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
			defer slog.SetDefault(before)
			p := openTLS(t, c.addr, c.settings.secure(), 500)
			front := httptest.NewServer(api.Handler(p.publish))
			defer front.Close()
			start := time.Now()
			for range 10 {
				if code, _, _ := post(t, front.URL, "k"); code != 503 {
					t.Errorf("answered %d", code)
				}
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("10 answers took %v", took)
			}
			if state := p.peers()["publisher"]; !strings.Contains(state, c.says) {
				t.Errorf("its state is %q", state)
			}
			if said := log.String(); strings.Count(said, "is away") != 1 || !strings.Contains(said, c.says) {
				t.Errorf("the log says\n%s", said)
			}
		})
	}
}

func TestSettingsThatAreWrong(t *testing.T) {
	for name, c := range map[string]struct {
		settings settings
		says     string
	}{
		"an authority without TLS":         {settings{CAFile: "ca.pem"}, "PUBLISHER_TLS must be true"},
		"an authority that is not there":   {settings{TLS: true, CAFile: "none.pem"}, "PUBLISHER_CA_FILE can't be read"},
		"an authority that is none":        {settings{TLS: true, CAFile: "tls_test.go"}, "PUBLISHER_CA_FILE must be certificates"},
		"an address that has no such form": {settings{Publisher: "\x00"}, "PUBLISHER_ADDR"},
	} {
		c.settings.GroupSize = 1
		if _, err := build(t.Context(), c.settings); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: the error is %v, not %q", name, err, c.says)
		}
	}
}
