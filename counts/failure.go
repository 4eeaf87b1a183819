package counts

import (
	_ "embed"
	"strings"

	"github.com/redis/go-redis/v9"
)

//go:embed rights.acl
var rightsFile string

// rights are what an ACL user needs.
var rights = strings.TrimSpace(rightsFile)

// replies are what a store answers that does not pass by itself, by the beginning of its error; in the advice, $ stands
// for the beginning of the variables' names.
var replies = []struct {
	prefix   string
	contents bool
	advice   string
}{
	{"NOAUTH", false, "the store wants a password: set $PASSWORD, and $USERNAME for an ACL user"},
	{"Protocol error: unauthenticated", false, "the store wants a password: set $PASSWORD, and $USERNAME for an ACL user"},
	{"WRONGPASS", false, "$PASSWORD is wrong, or $USERNAME"},
	{"NOPERM", false, "the store's ACL must give this user " + rights},
	{"ACL failure in script", false, "the store's ACL must give this user " + rights},
	{"WRONGTYPE", false, "something else has written to a key that the counts are in: rename or delete it"},
	{"NOTANUMBER", true, "something else has written there: set it to a number or delete it"},
	{"CROSSSLOT", false, "a cluster can't count in one step: use one primary with replicas"},
	{"MOVED", false, "a cluster can't count in one step: use one primary with replicas"},
	{"Unknown Redis command called from script", false, "the store is too old: Redis 7.0 and Valkey 7.2 are the oldest that will do"},
	{"unknown command", false, "the store is too old: Redis 7.0 and Valkey 7.2 are the oldest that will do"},
	{"Unexpected engine in script shebang", false, "the store is too old: Redis 7.0 and Valkey 7.2 are the oldest that will do"},
}

// failure returns the *Failure that err is to a caller, or nil.
func (s *server) failure(err error) error {
	if err == nil {
		return nil
	}
	f := &Failure{Err: err}
	f.Advice, f.Lasting = s.settings.tls(s.prefix).Advice(err)
	for _, r := range replies {
		if redis.HasErrorPrefix(err, r.prefix) {
			f.Lasting, f.Contents, f.Advice = true, r.contents, r.advice
		}
	}
	switch {
	case redis.IsOOMError(err):
		f.Advice = "the store's memory is full: give it more, or remember the ids for a shorter DEDUPE_WINDOW"
	case !f.Lasting && s.settings.SentinelMaster != "" && strings.Contains(err.Error(), "all sentinels"):
		f.Advice = "no Sentinel of $SENTINEL_ADDRS knows the master $SENTINEL_MASTER"
	}
	f.Advice = strings.ReplaceAll(f.Advice, "$", s.prefix)
	return f
}
