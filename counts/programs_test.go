package counts_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"isobar.dev/config/local"
)

func TestPrograms(t *testing.T) {
	both(t, func(t *testing.T, k kind) {
		program := filepath.Join(t.TempDir(), "writer")
		out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "isobar.dev/functions/"+k.name+"-writer").CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		prefix := strings.ToUpper(k.name) + "_"

		for name, c := range map[string]struct{ variable, says string }{
			"no address":            {"X=", prefix + "ADDR"},
			"a wrong address":       {prefix + "ADDR=here", prefix + "ADDR"},
			"a wrong window":        {"DEDUPE_WINDOW=1ms", "DEDUPE_WINDOW"},
			"a wrong size of group": {"GROUP_SIZE=0", "GROUP_SIZE"},
		} {
			t.Run(name, func(t *testing.T) {
				cmd := exec.CommandContext(within(t, 5*time.Second), program)
				cmd.Env = []string{c.variable}
				if !strings.HasPrefix(c.variable, "X") && !strings.HasPrefix(c.variable, prefix) {
					cmd.Env = append(cmd.Env, prefix+"ADDR=127.0.0.1:1")
				}
				out, err := cmd.CombinedOutput()
				if err == nil || !strings.Contains(string(out), c.says) {
					t.Errorf("it ended with %v and said %s", err, out)
				}
			})
		}

		store := k.server(t)
		must(t, store.Kill())
		port, err := local.FreePort()
		must(t, err)
		writer := local.NewProcess(local.Spec{
			Name: "writer", Path: program, Log: filepath.Join(t.TempDir(), "writer.log"), Addr: fmt.Sprint("127.0.0.1:", port),
			Env: []string{"HOST=127.0.0.1", fmt.Sprint("PORT=", port), prefix + "ADDR=" + store.Addr()},
		})
		t.Cleanup(func() { must(t, writer.Kill()) })
		must(t, writer.Start(within(t, 5*time.Second)))
		url := "http://" + writer.Addr()

		if body := get(t, url+"/readyz"); !strings.Contains(body, `"status":"ok"`) || !strings.Contains(body, k.name) {
			t.Errorf("ready without a store: %s", body)
		}
		send := func() int {
			res, err := http.Post(url, structured, strings.NewReader(one("1", sunny)))
			must(t, err)
			_ = res.Body.Close()
			return res.StatusCode
		}
		if status := send(); status != 503 {
			t.Errorf("status %d without a store", status)
		}
		must(t, store.Start(within(t, 30*time.Second)))
		await(t, 10*time.Second, "it counts once the store is there", func() bool { return send() == 204 })
		if n := holds(t, look(t, store.Addr())).total; n != 1 {
			t.Errorf("%d were counted", n)
		}
		must(t, writer.Stop(within(t, 10*time.Second)))
		log, err := os.ReadFile(writer.Log())
		must(t, err)
		for _, line := range []string{"does not count: waiting for it", "counts again", "draining"} {
			if !strings.Contains(string(log), line) {
				t.Errorf("the log does not say %q:\n%s", line, log)
			}
		}
	})
}

func get(t testing.TB, url string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	must(t, err)
	res, err := http.DefaultClient.Do(r)
	must(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(t, err)
	return string(body)
}
