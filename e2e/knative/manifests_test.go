package knative

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// kustomizations are the folders of all that can be applied, and of all components.
func kustomizations(t *testing.T) (applied, components []string) {
	t.Helper()
	for _, top := range []string{"config", "eventing"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || filepath.Base(path) != "kustomization.yaml" {
				return err
			}
			folder, err := filepath.Rel(root, filepath.Dir(path))
			if err != nil {
				return err
			}
			text, err := os.ReadFile(path)
			if strings.Contains(string(text), "\nkind: Component\n") {
				components = append(components, folder)
			} else {
				applied = append(applied, folder)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return applied, components
}

// Every manifest, in every overlay and with every component, is accepted by the API server field by field, and by
// kubeconform against the schemas that the API server itself publishes.
func TestManifests(t *testing.T) {
	schemas := t.TempDir()
	writeSchemas(t, schemas)
	for _, n := range []string{"kafka", "rabbitmq", "redis"} {
		if _, err := run(t.Context(), "", "kubectl", "get", "namespace", n); err != nil {
			t.Fatal(err)
		}
	}
	applied, components := kustomizations(t)
	used := map[string]bool{}
	for _, folder := range applied {
		text, err := os.ReadFile(filepath.Join(root, folder, "kustomization.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range components {
			from, err := filepath.Rel(folder, c)
			if err != nil {
				t.Fatal(err)
			}
			used[c] = used[c] || strings.Contains(string(text), "- "+from+"\n")
		}
		t.Run(folder, func(t *testing.T) { accepted(t, schemas, folder) })
	}
	for _, c := range components {
		if used[c] {
			continue
		}
		t.Run(c, func(t *testing.T) { // beside the services, which it is made for
			folder := filepath.Join(root, ".isobar", "with-component")
			if err := os.MkdirAll(folder, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(folder) })
			text := "resources: [../../config/services]\ncomponents: [../../" + c + "]\n"
			if err := os.WriteFile(filepath.Join(folder, "kustomization.yaml"), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			accepted(t, schemas, ".isobar/with-component")
		})
	}
}

func accepted(t *testing.T, schemas, folder string) {
	t.Helper()
	manifests := kubectl(t, "kustomize", folder)
	// Knative wants to know an image's registry; ko has not named it yet.
	manifests = strings.ReplaceAll(manifests, "image: ko://isobar.dev/", "image: registry.example.com/isobar/")
	if _, err := run(t.Context(), manifests, "kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"); err != nil {
		t.Error(err)
	}
	out, err := run(t.Context(), manifests, "kubeconform", "-strict", "-summary",
		"-schema-location", schemas+"/{{.ResourceKind}}-{{.Group}}-{{.ResourceAPIVersion}}.json")
	if err != nil {
		t.Errorf("%v%s", err, out)
	}
	t.Log(strings.TrimSpace(out))
}

// writeSchemas writes a JSON schema for each kind that the API server knows: strict, so that no unknown field is taken.
func writeSchemas(t *testing.T, dir string) {
	t.Helper()
	var index struct {
		Paths map[string]struct{ ServerRelativeURL string }
	}
	parse(t, kubectl(t, "get", "--raw", "/openapi/v3"), &index)
	for _, path := range slices.Sorted(maps.Keys(index.Paths)) {
		if path != "api/v1" && !strings.HasPrefix(path, "apis/") {
			continue
		}
		var document struct {
			Components struct{ Schemas map[string]map[string]any }
		}
		parse(t, kubectl(t, "get", "--raw", index.Paths[path].ServerRelativeURL), &document)
		schemas := document.Components.Schemas
		for _, schema := range schemas {
			makeStrict(schema)
		}
		for name, schema := range schemas {
			kinds, _ := schema["x-kubernetes-group-version-kind"].([]any)
			if len(kinds) != 1 {
				continue // what all kinds have, like options
			}
			kind := kinds[0].(map[string]any)
			if kind["group"] == "" {
				kind["group"] = kind["version"] // as kubeconform calls the core's
			}
			text, err := json.Marshal(map[string]any{
				"$ref":       "#/components/schemas/" + name,
				"components": map[string]any{"schemas": schemas},
			})
			if err != nil {
				t.Fatal(err)
			}
			file := strings.ToLower(fmt.Sprintf("%s-%s-%s.json", kind["kind"], kind["group"], kind["version"]))
			if err := os.WriteFile(filepath.Join(dir, file), text, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func parse(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatal(err)
	}
}

// makeStrict forbids the fields that a schema does not name.
func makeStrict(schema map[string]any) {
	properties, _ := schema["properties"].(map[string]any)
	_, more := schema["additionalProperties"]
	if len(properties) > 0 && !more && schema["x-kubernetes-preserve-unknown-fields"] != true {
		schema["additionalProperties"] = false
	}
	if schema["x-kubernetes-int-or-string"] == true {
		delete(schema, "type")
	}
	inner := slices.Collect(maps.Values(properties))
	for _, s := range append(inner, schema["items"], schema["additionalProperties"]) {
		if s, ok := s.(map[string]any); ok {
			makeStrict(s)
		}
	}
}

// images are those that are deployed.
func images(t *testing.T) []string {
	t.Helper()
	var found []string
	for line := range strings.Lines(kubectl(t, "kustomize", "deploy")) {
		if image, ok := strings.CutPrefix(strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "- ")), "image: "); ok {
			found = append(found, image)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// pulled asks the registry how many bytes are pulled of an image, and whether its list of parts is beside it.
func pulled(t *testing.T, image string) (size int, sbom bool) {
	t.Helper()
	registry, rest, _ := strings.Cut(image, "/")
	name, digest, _ := strings.Cut(rest, "@")
	manifest := func(reference string) (string, error) {
		return fetch(t.Context(), "http://"+registry+"/v2/"+name+"/manifests/"+reference)
	}
	text, err := manifest(digest)
	if err != nil {
		t.Fatalf("ask the registry for %s: %v", image, err)
	}
	var m struct{ Layers []struct{ Size int } }
	parse(t, text, &m)
	for _, layer := range m.Layers {
		size += layer.Size
	}
	_, err = manifest(strings.Replace(digest, ":", "-", 1) + ".sbom")
	return size, err == nil
}

func fetch(ctx context.Context, address string) (string, error) {
	return run(ctx, "", "curl", "-q", "-fsS", "-H", "Accept: application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json", address)
}
