-- What wrk asks for. The first argument names it, the rest are its own:
--   get [TOKEN]                the URL itself, with a bearer token
--   paced PAUSE                the URL itself, with a pause of so many milliseconds on average before each request of a
--                              connection
--   login USERNAME PASSWORD [PATH]
--                              a login at /token, or where a peer has it; both are plain letters and digits
--   refresh FILE [PAUSE [CLIENT]]
--                              refreshes of the sessions whose refresh tokens FILE has, a line each, in turn; with a
--                              pause of so many milliseconds on average before each request of a connection, if it is
--                              not 0; naming the client, for a peer that needs it
-- At its end it says one line of JSON. Times in it are microseconds.

local form = { ["Content-Type"] = "application/x-www-form-urlencoded" }
local tokens, first, last = {}, 1, 0
refused = 0 -- global: `done` runs in another state and asks for it by name

local scripts = {}

-- Far more connections than requests under way, each at a moment of its own: an open loop.
local function pause(milliseconds)
  math.randomseed(os.time())
  delay = function() return math.random(0, 2 * milliseconds) end
end

function scripts.paced(milliseconds)
  pause(tonumber(milliseconds))
  scripts.get()
end

function scripts.get(token)
  if token then wrk.headers["Authorization"] = "Bearer " .. token end
  response = function(status)
    if status ~= 200 then refused = refused + 1 end
  end
end

function scripts.login(username, password, path)
  local text = wrk.format("POST", path or "/token", form, "grant_type=password&username=" .. username .. "&password=" .. password)
  request = function() return text end
  scripts.get()
end

function scripts.refresh(file, milliseconds, client)
  local rest = client and "&client_id=" .. client or ""
  for line in io.lines(file) do
    last = last + 1
    tokens[last] = line
  end
  if tonumber(milliseconds or 0) > 0 then pause(tonumber(milliseconds)) end
  request = function()
    if first > last then error("more connections than sessions") end
    local token = tokens[first]
    tokens[first] = nil
    first = first + 1
    return wrk.format("POST", "/token", form, "grant_type=refresh_token&refresh_token=" .. token .. rest)
  end
  response = function(status, headers, body)
    local token = status == 200 and body:match('"refresh_token":%s*"([^"]+)"')
    if token then
      last = last + 1
      tokens[last] = token
    else
      refused = refused + 1
    end
  end
end

local threads = {}

function setup(thread)
  threads[#threads + 1] = thread
end

function init(arguments)
  scripts[arguments[1]](arguments[2], arguments[3], arguments[4])
end

function done(summary, latency)
  local errors, wrong = summary.errors, 0
  for _, thread in ipairs(threads) do
    wrong = wrong + thread:get("refused")
  end
  io.write(string.format(
    '\nJSON {"requests":%d,"microseconds":%d,"p50":%d,"p99":%d,"most":%d,"refused":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    wrong + errors.connect + errors.read + errors.write + errors.timeout
  ))
end
