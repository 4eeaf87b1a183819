package local

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Kind is a kind of server.
type Kind string

// The servers that this package can install and run.
const (
	KafkaKind    Kind = "kafka"
	RabbitMQKind Kind = "rabbitmq"
	RedisKind    Kind = "redis"
	ValkeyKind   Kind = "valkey"
)

// Kinds are all of them.
var Kinds = []Kind{KafkaKind, RabbitMQKind, RedisKind, ValkeyKind}

// Variables name, for each kind of server, the environment variable that gives the address of one to be used instead.
var Variables = map[Kind]string{
	KafkaKind:    "KAFKA_BOOTSTRAP_SERVERS",
	RabbitMQKind: "RABBITMQ_ADDR",
	RedisKind:    "REDIS_ADDR",
	ValkeyKind:   "VALKEY_ADDR",
}

// Install fetches the servers of the given kinds, all of them if none is given, into isobar in the user's cache
// directory ($XDG_CACHE_HOME or ~/.cache), and by apt what fetching and running them needs. It tells what it does on
// progress, which may be nil. What is there already is not fetched again: then it takes milliseconds and needs neither
// root nor a network. It is safe to call it from several processes at once and to break it off: a server is there whole or
// not at all. Its error names the environment variables to set where servers can't be installed.
func Install(ctx context.Context, progress io.Writer, kinds ...Kind) error {
	if len(kinds) == 0 {
		kinds = Kinds
	}
	if progress == nil {
		progress = io.Discard
	}
	if err := install(ctx, progress, kinds); err != nil {
		var variables []string
		for _, k := range kinds {
			variables = append(variables, Variables[k])
		}
		return fmt.Errorf("install %v: %w\n\nInstalling takes apt, root and a network; servers that run elsewhere are used instead once these name them: %s",
			kinds, err, strings.Join(variables, ", "))
	}
	return nil
}

// installed is something in the cache directory: a whole of it that appears at once.
type installed struct {
	name  string // of its directory; a change of what is in it must change the name
	title string
	kinds []Kind
	fetch func(ctx context.Context, in *installation, title, dir string) error
}

var jre = []string{"openjdk-17-jre-headless", "openjdk-21-jre-headless", "openjdk-25-jre-headless", "default-jre-headless"}

// kafkaTree and debianTree are what Install fetches.
var (
	kafkaTree = installed{
		name: "kafka-4.3.1-a", title: "Kafka 4.3.1 (Maven)",
		kinds: []Kind{KafkaKind},
		fetch: fetchKafka,
	}
	debianTree = installed{
		name: "debian-trixie-b", title: "RabbitMQ 4.0, Redis 8 and Valkey 8 (Debian trixie)",
		kinds: []Kind{RabbitMQKind, RedisKind, ValkeyKind},
		fetch: fetchDebian,
	}
)

func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "isobar"), nil
}

// path is where it is once it is installed.
func (t *installed) path() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, t.name)
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("%s is not installed; Install does it: %w", t.title, err)
	}
	return dir, nil
}

// installation is one call of Install that has something to do.
type installation struct {
	progress io.Writer
	cache    string
	updated  bool // apt's lists
}

func install(ctx context.Context, progress io.Writer, kinds []Kind) error {
	var missing []*installed
	for _, t := range []*installed{&debianTree, &kafkaTree} {
		wanted := slices.ContainsFunc(kinds, func(k Kind) bool { return slices.Contains(t.kinds, k) })
		if _, err := t.path(); wanted && err != nil {
			missing = append(missing, t)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	in := &installation{progress: progress, cache: cache}
	unlock, err := in.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	for _, t := range missing {
		if _, err := t.path(); err == nil {
			continue // whoever had the lock has done it
		}
		if err := in.install(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// lock waits until no other process installs. The lock is the kernel's: it ends with the process that holds it.
func (in *installation) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(in.cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for told := false; ; told = true {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !told {
			fmt.Fprintln(in.progress, "waiting for another process that installs the same")
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (in *installation) install(ctx context.Context, t *installed) error {
	left, _ := filepath.Glob(filepath.Join(in.cache, "unfinished-*"))
	for _, dir := range left {
		_ = os.RemoveAll(dir)
	}
	dir, err := os.MkdirTemp(in.cache, "unfinished-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if err := t.fetch(ctx, in, t.title, dir); err != nil {
		return err
	}
	return os.Rename(dir, filepath.Join(in.cache, t.name))
}

// need installs Debian packages unless have says that what is wanted of them is there.
func (in *installation) need(ctx context.Context, have func() bool, packages ...string) error {
	if have() {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s is missing and only root can install it", strings.Join(packages, " or "))
	}
	if !in.updated {
		if err := in.run(ctx, "apt-get update", "apt-get", "update", "-q"); err != nil {
			return err
		}
		in.updated = true
	}
	var err error
	for _, p := range packages {
		err = in.run(ctx, "apt-get install "+p, "apt-get", "install", "-q", "-y", "--no-install-recommends", p)
		if err == nil && have() {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
	}
	return err
}

// run runs a command and shows that time passes. Its output goes to a log, the end of which is part of the error.
func (in *installation) run(ctx context.Context, what, name string, args ...string) error {
	log := filepath.Join(in.cache, "install.log")
	p := exec.CommandContext(ctx, name, args...)
	p.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8")
	// A group of its own: Ctrl-C is for this process, which then ends all of the group.
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	p.Cancel = func() error { return syscall.Kill(-p.Process.Pid, syscall.SIGTERM) }
	p.WaitDelay = 10 * time.Second
	f, err := os.Create(log)
	if err != nil {
		return err
	}
	defer f.Close()
	p.Stdout, p.Stderr = f, f

	return step(in.progress, what, func() error {
		if err := p.Run(); err != nil {
			return fmt.Errorf("%s: %w\nthe last lines of %s:\n%s", what, errors.Join(err, ctx.Err()), log, Tail(log, 15))
		}
		return nil
	})
}

// step does something that may take long, saying so in a line before, in one every ten seconds, and in one after it.
func step(progress io.Writer, what string, do func() error) error {
	start := time.Now()
	fmt.Fprintf(progress, "%s ...\n", what)
	done := make(chan error, 1)
	go func() { done <- do() }()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err == nil {
				fmt.Fprintf(progress, "%s: done in %.1f s\n", what, time.Since(start).Seconds())
			}
			return err
		case <-tick.C:
			fmt.Fprintf(progress, "%s ... %.0f s\n", what, time.Since(start).Seconds())
		}
	}
}

func found(program string) func() bool {
	return func() bool {
		_, err := exec.LookPath(program)
		return err == nil
	}
}

//go:embed kafka.pom.xml
var kafkaPOM []byte

// fetchKafka makes: lib, the jars; java, a link to a Java that can run them; formatted, an empty Kafka's data, so that a
// first start need not run Kafka's formatter, which takes as long as starting does.
func fetchKafka(ctx context.Context, in *installation, title, dir string) error {
	if err := in.need(ctx, func() bool { return findJava(ctx) != "" }, jre...); err != nil {
		return err
	}
	if err := in.need(ctx, found("mvn"), "maven"); err != nil {
		return err
	}
	if err := os.Symlink(findJava(ctx), filepath.Join(dir, "java")); err != nil {
		return err
	}
	pom := filepath.Join(dir, "pom.xml")
	if err := os.WriteFile(pom, kafkaPOM, 0o644); err != nil {
		return err
	}
	if err := in.run(ctx, "fetching "+title, "mvn", "--batch-mode", "--no-transfer-progress", "--file", pom,
		"--update-snapshots", // else Maven remembers for a day that the network was away
		"dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory="+filepath.Join(dir, "lib")); err != nil {
		return err
	}
	return formatKafka(ctx, dir, filepath.Join(dir, "formatted"))
}

// findJava returns the path of a Java 17 or newer, or nothing.
func findJava(ctx context.Context) string {
	candidates, _ := filepath.Glob("/usr/lib/jvm/*/bin/java")
	if java, err := exec.LookPath("java"); err == nil {
		candidates = append([]string{java}, candidates...)
	}
	if home := os.Getenv("JAVA_HOME"); home != "" {
		candidates = append([]string{filepath.Join(home, "bin", "java")}, candidates...)
	}
	for _, java := range candidates {
		out, err := exec.CommandContext(ctx, java, "-version").CombinedOutput() // openjdk version "17.0.15" 2025-04-15
		if err != nil {
			continue
		}
		_, version, _ := bytes.Cut(out, []byte(`version "`))
		major, _, _ := bytes.Cut(version, []byte("."))
		if n, err := strconv.Atoi(string(bytes.TrimRight(major, "\"-ea"))); err == nil && n >= 17 {
			return java
		}
	}
	return ""
}

// fetchDebian unpacks the servers' Debian 13 packages and all that they depend on, and installs nothing: no script of a
// package runs, so it works in a container that may mount nothing, and on any distribution with apt.
func fetchDebian(ctx context.Context, in *installation, title, dir string) error {
	if err := in.need(ctx, found("mmdebstrap"), "mmdebstrap"); err != nil {
		return err
	}
	const keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if err := in.need(ctx, func() bool { _, err := os.Stat(keys); return err == nil }, "debian-archive-keyring"); err != nil {
		return err
	}
	// People look at the stores with it; nothing of ours needs it.
	if os.Geteuid() == 0 {
		_ = in.need(ctx, found("redis-cli"), "redis-tools")
	}
	tree := filepath.Join(dir, "tree")
	if err := in.run(ctx, "fetching "+title, "mmdebstrap", "--variant=extract",
		"--include=rabbitmq-server,redis-server,valkey-server", "trixie", tree); err != nil {
		return err
	}
	return debianLaunchers(dir)
}

// debianLaunchers writes the small scripts by which this machine runs what is in the tree: each program by the tree's own
// dynamic linker with the tree's own libraries, as they are newer than the machine's. Compared with chroot, the programs
// see the machine as it is: their data can be anywhere, /proc is there, and it does not take root.
func debianLaunchers(dir string) error {
	tree, err := openDebian(dir)
	if err != nil {
		return err
	}
	if err := os.Mkdir(tree.bin, 0o755); err != nil {
		return err
	}
	programs := []string{
		"usr/bin/redis-server", "usr/bin/redis-cli", "usr/bin/valkey-server", "usr/bin/valkey-cli",
		filepath.Join(tree.erts, "beam.smp"), filepath.Join(tree.erts, "erlexec"),
		filepath.Join(tree.erts, "erl_child_setup"), filepath.Join(tree.erts, "inet_gethost"),
	}
	// The scripts find the tree from where they are, as it is still to be renamed.
	for _, p := range programs {
		script := fmt.Sprintf("#!/bin/sh\nd=${0%%/*}/../tree\nexec \"$d/%s\" --library-path \"$d/%s\" \"$d/%s\" \"$@\"\n",
			tree.linker, filepath.Dir(tree.linker), p)
		if err := os.WriteFile(filepath.Join(tree.bin, filepath.Base(p)), []byte(script), 0o755); err != nil {
			return err
		}
	}
	// RabbitMQ runs this one now and then to make sure that epmd runs, Erlang's name server for clusters. There is no
	// cluster here and there shall be no epmd.
	return os.WriteFile(filepath.Join(tree.bin, "erl"), []byte("#!/bin/sh\nexit 0\n"), 0o755)
}

// debian is the unpacked tree. Paths are relative to its root but for root and bin.
type debian struct {
	root, bin          string
	linker, erts, home string // the dynamic linker, Erlang's binaries, RabbitMQ
}

func openDebian(dir string) (*debian, error) {
	d := &debian{root: filepath.Join(dir, "tree"), bin: filepath.Join(dir, "bin")}
	for pattern, to := range map[string]*string{
		"usr/lib/*-linux-gnu*/ld-linux*.so.*":     &d.linker,
		"usr/lib/erlang/erts-*/bin":               &d.erts,
		"usr/lib/rabbitmq/lib/rabbitmq_server-4*": &d.home,
	} {
		paths, _ := filepath.Glob(filepath.Join(d.root, pattern))
		if len(paths) != 1 {
			return nil, fmt.Errorf("look for %s in %s: %d found, 1 expected", pattern, d.root, len(paths))
		}
		*to, _ = filepath.Rel(d.root, paths[0])
	}
	return d, nil
}

func installedDebian() (*debian, error) {
	dir, err := debianTree.path()
	if err != nil {
		return nil, err
	}
	return openDebian(dir)
}
