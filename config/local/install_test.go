package local

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestInstall(t *testing.T) {
	t.Run("a second time is quick, says nothing and needs nothing", func(t *testing.T) {
		if err := Install(t.Context(), t.Output()); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", "")
		progress, start := &told{}, time.Now()
		if err := Install(t.Context(), progress); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 50*time.Millisecond || progress.String() != "" {
			t.Errorf("it took %v and said %q", took, progress)
		}
	})
	t.Run("where it can't be done it names what to set", func(t *testing.T) {
		t.Setenv("XDG_CACHE_HOME", t.TempDir())
		t.Setenv("PATH", "")
		err := Install(t.Context(), t.Output(), RabbitMQKind, RedisKind)
		if err == nil || !strings.Contains(err.Error(), "RABBITMQ_ADDR, REDIS_ADDR") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("broken off, it leaves nothing that looks whole", func(t *testing.T) {
		cache := t.TempDir()
		t.Setenv("XDG_CACHE_HOME", cache)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := Install(ctx, t.Output(), RedisKind); err == nil {
			t.Fatal("no error")
		}
		if left, _ := filepath.Glob(filepath.Join(cache, "isobar", "*-*")); len(left) > 0 {
			t.Errorf("%v is left", left)
		}
	})
	t.Run("what an end in the middle has left is removed and not used", func(t *testing.T) {
		cache := t.TempDir()
		t.Setenv("XDG_CACHE_HOME", cache)
		half := filepath.Join(cache, "isobar", "unfinished-1")
		if err := os.MkdirAll(half, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", "")
		if err := Install(t.Context(), t.Output(), RedisKind); err == nil {
			t.Error("no error")
		}
		if _, err := os.Stat(half); err == nil {
			t.Errorf("%s is left", half)
		}
	})
	t.Run("waits for another that installs", func(t *testing.T) {
		in := &installation{progress: t.Output(), cache: t.TempDir()}
		unlock, err := in.lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := in.lock(ctx); err == nil {
			t.Error("it does not wait")
		}
		unlock()
		again, err := in.lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		again()
	})
}

// In a container that may mount nothing, everything is installed anew and run.
func TestWithoutTheRightToMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has rights to give up")
	}
	cmd := exec.CommandContext(t.Context(), "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin",
		os.Args[0], "-test.run=^TestServer$/.*/^listens", "-test.v")
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "listens_on_loopback_only,_with_TLS_too (") != len(Kinds) {
		t.Errorf("%v\n%s", err, out)
	}
}
