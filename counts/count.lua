#!lua
-- Counts the reports whose ids are not remembered, and remembers these: all of it or, with an error, nothing of it.
-- Redis never undoes what a script has written. So all that could fail is asked first, and only then is anything written.
--
-- KEYS  1 country:counts, 2 weather:counts, 3 messages:total, 4 messages:seen:until, from 5 messages:seen:1 and so on
-- ARGV  1 the window in milliseconds
--       2 "1" if something must be written in any case: WAIT waits for the connection's own last write only
--       3 the ids, WIDTH bytes each
--       4 for each id the numbers of its country and of its weather, each from 0 and in 2 bytes
--       5 how many countries follow; from 6 the countries and then the weathers
local WIDTH = 14
local MANY = 4000 -- Lua unpacks less than 8000 values
local SETS = #KEYS - 4
local window, ids, places, countries = tonumber(ARGV[1]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local share = math.ceil(window / 4)

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A set takes ids until a time that messages:seen:until tells, and expires a window after that. Which sets there are is
-- read from the sets themselves and not worked out from the time: so nothing is forgotten when the window is changed or
-- the clock jumps back.
local numbers = {}
for i = 1, SETS do numbers[i] = i end
local untils = redis.call('HMGET', KEYS[4], unpack(numbers))
local live, longer = {}, {}
local current, latest, free
for i = 1, SETS do
  local key = KEYS[4 + i]
  local expires = redis.call('PEXPIRETIME', key)
  if expires == -2 then
    free = free or i
  else
    live[#live + 1] = key
    local till = tonumber(untils[i] or 0)
    untils[i] = till
    if till > 0 and expires < till + window then longer[key] = till + window end
    if not latest or till > untils[latest] then latest = i end
    if till > now and till <= now + 2 * share and (not current or till < untils[current]) then current = i end
  end
end

local fresh, byCountry, byWeather = {}, {}, {}
local mine = {}
local total = #ids / WIDTH
for from = 1, total, MANY do
  local some, at = {}, {}
  for i = from, math.min(from + MANY - 1, total) do
    local id = ids:sub((i - 1) * WIDTH + 1, i * WIDTH)
    if not mine[id] then
      mine[id] = true
      some[#some + 1], at[#at + 1] = id, i
    end
  end
  local seen
  for _, key in ipairs(#some > 0 and live or {}) do
    local known = redis.call('SMISMEMBER', key, unpack(some))
    for i = 1, #known do
      if known[i] ~= 0 then
        seen = seen or {}
        seen[i] = true
      end
    end
  end
  local new = seen and {} or some
  for i = 1, #some do
    if not seen or not seen[i] then
      if seen then new[#new + 1] = some[i] end
      local c1, c2, w1, w2 = places:byte(at[i] * 4 - 3, at[i] * 4)
      local country, weather = ARGV[6 + c1 * 256 + c2], ARGV[6 + countries + w1 * 256 + w2]
      byCountry[country] = (byCountry[country] or 0) + 1
      byWeather[weather] = (byWeather[weather] or 0) + 1
    end
  end
  if #new > 0 then fresh[#fresh + 1] = new end
end

if #fresh == 0 then
  for key, at in pairs(longer) do redis.call('PEXPIREAT', key, at) end
  if ARGV[2] == '1' then redis.call('HSET', KEYS[4], 'confirmed', now) end
  return 0
end

local function countable(value) return not value or #value < 19 and value:find('^-?%d+$') end
local function check(key, by)
  local fields = {}
  for field in pairs(by) do fields[#fields + 1] = field end
  for from = 1, #fields, MANY do
    local to = math.min(from + MANY - 1, #fields)
    for i, value in ipairs(redis.call('HMGET', key, unpack(fields, from, to))) do
      if not countable(value) then
        return redis.error_reply('NOTANUMBER field ' .. fields[from + i - 1] .. ' of ' .. key .. ' holds ' .. value)
      end
    end
  end
end
local bad = check(KEYS[1], byCountry) or check(KEYS[2], byWeather)
if bad then return bad end
local sum = redis.call('GET', KEYS[3])
if not countable(sum) then return redis.error_reply('NOTANUMBER ' .. KEYS[3] .. ' holds ' .. sum) end
for _, call in ipairs({
  { 'PEXPIREAT', KEYS[4], 1 }, { 'HSET', KEYS[4], 1, 1 }, { 'SADD', KEYS[5], 1 },
  { 'HINCRBY', KEYS[1], 1, 1 }, { 'INCRBY', KEYS[3], 1 },
}) do
  if not redis.acl_check_cmd(unpack(call)) then
    return redis.error_reply('NOPERM the user may not ' .. call[1] .. ' ' .. call[2])
  end
end

if not current then
  -- Without a free one, the window or the clock has changed several times: a set that lives longer does no harm.
  current = free or latest
  local till = math.max(now + share, not free and untils[latest] or 0)
  redis.call('HSET', KEYS[4], current, till)
  longer[KEYS[4 + current]] = till + window
  longer[KEYS[4]] = till + window
end
local n = 0
for _, some in ipairs(fresh) do n = n + redis.call('SADD', KEYS[4 + current], unpack(some)) end
for key, at in pairs(longer) do redis.call('PEXPIREAT', key, at) end
for country, more in pairs(byCountry) do redis.call('HINCRBY', KEYS[1], country, more) end
for weather, more in pairs(byWeather) do redis.call('HINCRBY', KEYS[2], weather, more) end
redis.call('INCRBY', KEYS[3], n)
return n
