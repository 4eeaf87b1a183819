package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"isobar.dev/config/local"
)

var ours = []string{
	local.Ingress, local.Publisher, local.KafkaSource, local.RabbitMQSource, local.RedisWriter, local.ValkeyWriter,
}

var servers = []string{"kafka", "rabbitmq", "redis", "valkey"}

// ticks is the unit of CPU times in /proc on Linux, per second.
const ticks = 100

// cpuTimes are the seconds of CPU that each process has used, with all processes of its group.
func (b *bench) cpuTimes() map[string]float64 {
	byGroup := map[int]float64{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may hold anything; the fields are counted from behind it.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		group, _ := strconv.Atoi(fields[2])
		user, _ := strconv.ParseFloat(fields[11], 64)
		system, _ := strconv.ParseFloat(fields[12], 64)
		byGroup[group] += (user + system) / ticks
	}
	times := map[string]float64{}
	for _, p := range b.system.Processes() {
		times[p.Name()] = byGroup[p.Pid()]
	}
	return times
}

// cpu adds what each process has used since, for each report.
func (b *bench) cpu(part string, before map[string]float64, reports float64) {
	after := b.cpuTimes()
	sum := func(names []string) (all float64) {
		for _, name := range names {
			used := (after[name] - before[name]) / reports * 1e6
			b.add(part, "CPU of "+name, used, "µs/report", "")
			all += used
		}
		return all
	}
	programs := sum(ours)
	others := sum(servers)
	b.add(part, "CPU of our programs", programs, "µs/report", fmt.Sprintf("≤ %.1f, the servers'", others))
	b.add(part, "CPU of the servers", others, "µs/report", "")
}

// memory adds the most that each of our programs has had in memory since its start.
func (b *bench) memory() error {
	for _, name := range ours {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.system.Process(name).Pid()))
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
		if err != nil {
			return err
		}
		b.add("peak memory", name, kib/1024, "MiB", "≤ 64 MiB")
	}
	return nil
}
