// Valkey-writer counts weather reports in Valkey.
package main

import (
	"context"

	"isobar.dev/counts"
	"isobar.dev/internal/serve"
)

type settings struct {
	counts.ProgramSettings
	Valkey counts.Settings `envPrefix:"VALKEY_"`
}

func main() {
	serve.Main("valkey-writer", func(_ context.Context, s settings) (*serve.Program, error) {
		return counts.Program("valkey", s.ProgramSettings, s.Valkey)
	})
}
