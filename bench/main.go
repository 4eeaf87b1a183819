// Bench measures how fast Isobar is, all of it on this machine: the load generator (wrk), the programs and the four
// servers, as durable as the contract says. It prints a table and writes it as JSON.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"isobar.dev/config/local"
)

var (
	out     = flag.String("out", "bench.json", "the file that gets the figures")
	seconds = flag.Int("seconds", 15, "how long each load lasts")
	backlog = flag.Int("backlog", 300_000, "how many reports are drained")
	only    = flag.String("only", "", "the parts to measure, separated by commas; all of them if empty")
)

// figure is one measured value.
type figure struct {
	Part  string  `json:"part"`
	What  string  `json:"what"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Goal  string  `json:"goal,omitempty"`
}

type bench struct {
	ctx     context.Context
	system  *local.System
	stores  stores
	figures []figure
}

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	if err := needWrk(); err != nil {
		return err
	}
	b := &bench{ctx: ctx}
	started, err := b.start(nil)
	if err != nil {
		return err
	}
	defer func() { started() }()
	for _, part := range []struct {
		name string
		run  func() error
	}{
		{"start", b.startTimes},
		{"warm", b.warm},
		{"limit", func() error { return b.limit("limit before") }},
		{"idle", b.idle},
		{"arrays", b.arrays},
		{"singles", b.singles},
		{"half", b.half},
		{"drain", b.drain},
		{"memory", b.memory},
		{"limit", func() error { return b.limit("limit after") }},
		{"one", func() error {
			started()
			if started, err = b.start([]string{"GROUP_SIZE=1"}); err != nil {
				return err
			}
			if err := b.warm(); err != nil {
				return err
			}
			return b.ungrouped()
		}},
	} {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), part.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "measuring: %s\n", part.name)
		if err := part.run(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	b.ratios()
	b.print()
	document, err := json.MarshalIndent(map[string]any{
		"time": time.Now().UTC().Format(time.RFC3339), "cores": runtime.NumCPU(), "go": runtime.Version(),
		"seconds": *seconds, "backlog": *backlog, "figures": b.figures,
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, append(document, '\n'), 0o644)
}

func needWrk() error {
	if _, err := exec.LookPath("wrk"); err == nil {
		return nil
	}
	fmt.Fprintln(os.Stderr, "installing wrk")
	if output, err := exec.Command("sh", "-c", "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq wrk").CombinedOutput(); err != nil {
		return fmt.Errorf("wrk, the load generator, is not there and cannot be installed: %w\n%s", err, output)
	}
	return nil
}

// start starts a system from nothing, with additions to the programs' environment.
func (b *bench) start(env []string) (stop func(), err error) {
	dir := filepath.Join(".isobar", "bench")
	if err := os.RemoveAll(filepath.Join(dir, "data")); err != nil {
		return nil, err
	}
	if b.system, err = local.NewSystem(dir, local.Options{Env: map[string][]string{"": env}}); err != nil {
		return nil, err
	}
	if err := b.system.Start(b.ctx, os.Stderr); err != nil {
		return nil, err
	}
	b.stores = newStores(b.system)
	system, open := b.system, b.stores
	return func() {
		open.close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := system.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "bench: stop:", err)
		}
	}, nil
}

func (b *bench) add(part, what string, value float64, unit, goal string) {
	b.figures = append(b.figures, figure{part, what, value, unit, goal})
	fmt.Fprintf(os.Stderr, "  %s, %s: %.4g %s\n", part, what, value, unit)
}

// value is a figure that has been measured, 0 if it has not.
func (b *bench) value(part, what string) float64 {
	for _, f := range b.figures {
		if f.Part == part && f.What == what {
			return f.Value
		}
	}
	return 0
}

// ratios puts the figures in proportion to the limit, the mean of before and after.
func (b *bench) ratios() {
	before, after := b.value("limit before", "both at once"), b.value("limit after", "both at once")
	const gathering = ", gathering writes"
	for _, of := range []string{"", gathering} {
		limit := (b.value("limit before", "both at once"+of) + b.value("limit after", "both at once"+of)) / 2
		if before == 0 || after == 0 {
			break
		}
		for _, r := range []struct{ part, goal string }{
			{"arrays of 100", "≥ 0.80"}, {"singles, 50 clients", "≥ 0.45"}, {"singles, 200 clients", "≥ 0.55"},
		} {
			if of != "" {
				r.goal = ""
			}
			if counted := b.value(r.part, "counted in both"); counted > 0 {
				b.add("of the limit"+of, r.part, counted/limit, "", r.goal)
			}
		}
	}
	for _, r := range []string{"singles, 50 clients", "singles, 200 clients"} {
		if one := b.value("group commit of one", r); one > 0 {
			b.add("group commit of one", r+", grouped is faster by", b.value(r, "counted in both")/one, "times", "")
		}
	}
}

func (b *bench) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PART\tWHAT\tVALUE\tUNIT\tGOAL")
	for _, f := range b.figures {
		value := fmt.Sprintf("%.2f", f.Value)
		if f.Value >= 100 {
			value = fmt.Sprintf("%.0f", f.Value)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", f.Part, f.What, value, f.Unit, f.Goal)
	}
	_ = w.Flush() // to a terminal or a file: whoever reads it sees what is missing
}
