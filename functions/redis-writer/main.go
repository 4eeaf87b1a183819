// Redis-writer counts weather reports in Redis.
package main

import (
	"context"

	"isobar.dev/counts"
	"isobar.dev/internal/serve"
)

type settings struct {
	counts.ProgramSettings
	Redis counts.Settings `envPrefix:"REDIS_"`
}

func main() {
	serve.Main("redis-writer", func(_ context.Context, s settings) (*serve.Program, error) {
		return counts.Program("redis", s.ProgramSettings, s.Redis)
	})
}
