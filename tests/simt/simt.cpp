// The emulated machine behind simt.h. Compiled once for all drivers: only kernels change from one to the next.
//
// One loop runs everything: deliver the stores that are due, pick a rank, a block and a thread, run it to its next
// primitive. All state changes are made between two switches of one OS thread, so nothing here needs a lock. Order of
// the parts: memory, blocks and grids, the pool of undelivered stores, scheduler, primitives, reports.
#include "simt.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <deque>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"

namespace tpfuse::simt {

using host::Meeting;
using host::Scope;
using host::Site;

namespace {

constexpr u64 kSecond = 1'000'000'000;

// ---- memory

constexpr unsigned char kFresh = 0xff;
constexpr unsigned char kCanary = 0xc5;
constexpr size_t kGuard = 4096;

// Bytes with a fence on both sides. Under AddressSanitizer the fences are poisoned and report by themselves.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    size_t total = (bytes + 2 * kGuard + kGuard - 1) / kGuard * kGuard;
    whole_ = static_cast<char*>(std::aligned_alloc(kGuard, total));
    behind_ = total - kGuard - bytes;
    std::memset(whole_, kCanary, total);
    std::memset(begin(), kFresh, bytes);
#if defined(SIMT_ASAN)
    __asan_poison_memory_region(whole_, kGuard);
    __asan_poison_memory_region(begin() + bytes, behind_);
#endif
  }
  Guarded(Guarded&& other) noexcept
      : whole_(std::exchange(other.whole_, nullptr)), bytes_(other.bytes_), behind_(other.behind_) {}
  ~Guarded() {
#if defined(SIMT_ASAN)
    if (whole_) __asan_unpoison_memory_region(whole_, kGuard + bytes_ + behind_);
#endif
    std::free(whole_);
  }

  char* begin() const { return whole_ + kGuard; }
  size_t bytes() const { return bytes_; }
  bool intact() const {
#if defined(SIMT_ASAN)
    return true;
#else
    auto canary = [](char c) { return static_cast<unsigned char>(c) == kCanary; };
    return std::all_of(whole_, whole_ + kGuard, canary) &&
           std::all_of(begin() + bytes_, begin() + bytes_ + behind_, canary);
#endif
  }

 private:
  char* whole_;
  size_t bytes_, behind_;
};

struct Region {
  Guarded memory;
  u32 rank;
  std::string name;
  bool peers_write = false;
};

// ---- blocks and grids

struct Block;
struct Grid;

// How many threads came to spin_pause since the last progress. Progress only begins a new round: counts of older rounds
// are void, and nobody has to visit them.
struct Spinning {
  u64 round = 0;
  u32 count = 0;
  u32 in(u64 now) const { return round == now ? count : 0; }
  void add(u64 now, i32 n) {
    if (round != now) *this = {now, 0};
    count += u32(n);
  }
};

enum class State { runnable, waiting, done };

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  u32 index = 0;
  u64 id = 0;  // unique over all launches
  State state = State::runnable;
  u32 slot = 0;      // in block->runnable
  u64 spun_in = 0;   // the round in which it last came to spin_pause
  u32 barriers = 0;  // of the whole block, behind it
  const char* doing = "start";
  Site site = {"", 0};
  Meeting meeting = Meeting::sync;
  u32 value = 0, source = 0, result = 0;
};

struct Warp {
  u32 living = 0, waiting = 0;  // lane masks
};

struct Barrier {
  u32 threads = 0;
  std::vector<Thread*> waiting;
};

// Blocks that start together and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;  // nullptr: has ended
  std::vector<Thread*> opening;
};

struct Block {
  Grid* grid = nullptr;
  std::shared_ptr<Cluster> cluster;
  u64 id = 0;        // unique over all launches
  u32 incoming = 0;  // words from its cluster on their way
  u32 index = 0, living = 0;
  u32 slot = 0;  // in the rank's ready list
  bool triggered = false;
  u64 stalled_until = 0;
  u32 quiet_warps = 0;  // mask
  Spinning spinning;
  u32 awaiting_others = 0;  // threads that wait for a grid or for the cluster
  std::unique_ptr<Thread[]> threads;
  std::vector<Thread*> runnable;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::unordered_map<const void*, Guarded> shared;
};

struct Grid {
  u32 rank = 0;
  u64 number = 0;
  u32 blocks = 0, block_threads = 0, cluster = 1;
  bool pdl = false;
  std::function<void()> kernel;
  std::vector<u32> order;                    // of clusters
  u32 started = 0, released = 0, ended = 0;  // blocks; released: triggered or ended
  u64 undelivered = 0;
  bool complete = false;
  bool previous_complete = false;
  std::vector<Thread*> dependents;  // threads of this grid in dependency_wait
};

struct Rank {
  std::deque<std::unique_ptr<Grid>> stream;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block*> ready;  // blocks that have a runnable thread
  u32 runnable = 0;           // threads
  // A thread that came to spin_pause since anything changed on its rank has seen all there is, and need not run.
  u64 round = 1;
  Spinning spinning;
  u32 slowness = 1;
  u64 weight = 1;
  u64 launches = 0;
};

// A store on its way: to a peer, to own memory that peers write to, or to the shared memory of a block of the cluster.
struct Parcel {
  u64 due, tie;  // in steps; ties in random order
  u64 sequence, thread, block;
  u32 barriers;  // behind the thread
  Grid* grid;
  char* to;
  u32 bytes, rank;  // where it goes
  std::array<unsigned char, 16> data;
  Block* target = nullptr;  // of the cluster
  u64* gate = nullptr;
};
bool later(const Parcel& a, const Parcel& b) { return std::tie(a.due, a.tie) > std::tie(b.due, b.tie); }

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string name_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return text("%s:%d", slash ? slash + 1 : site.file, site.line);
}

std::string name_of(const Thread& t) {
  return text("rank %u launch %llu block %u thread %u", t.block->grid->rank, t.block->grid->number, t.block->index,
              t.index);
}

}  // namespace

struct Machine::Impl {
  Impl(u32 world, u64 seed, Options options);

  // memory
  void* alloc_bytes(u32 rank, size_t bytes, const char* name);
  Region& find(const void* p, u32 bytes);
  void check_fences();

  // blocks and grids
  void launch(u32 rank, u32 grid, u32 block, std::function<void()> kernel, Launch how);
  bool may_start(const Rank& rank, size_t position) const;
  bool start_one(u32 rank);
  bool start_any();
  void start_block(Grid& grid, u32 index, const std::shared_ptr<Cluster>& cluster);
  void retire(Thread& t);
  void retire_block(Block& block);
  void finish_if_complete(Grid& grid);

  // undelivered stores
  Parcel parcel(char* to, const void* from, u32 bytes, u32 rank);
  void push(const Parcel& parcel);
  void send(char* to, const void* from, u32 bytes, u32 peer);
  void deliver(const Parcel& parcel);
  void deliver_first();
  void deliver_own(const char* from, u32 bytes);
  bool is_known(const Parcel& parcel) const;

  // scheduler
  void run();
  void step();
  void execute(Thread& t);
  Rank* pick_rank();
  Block& pick_block(Rank& rank);
  Thread& pick_thread(Block& block);
  bool awake(const Rank& rank) const { return rank.runnable > rank.spinning.in(rank.round); }
  bool awake(const Block& block) const {
    return block.runnable.size() > block.spinning.in(ranks[block.grid->rank].round);
  }
  bool awake(const Thread& t) const { return t.spun_in != ranks[t.block->grid->rank].round; }
  void count_spinning(Thread& t, i32 n);
  void new_epoch();
  void progress(u32 rank);
  void idle();
  void make_runnable(Thread& t);
  void put_to_sleep(Thread& t);
  void yield();
  void preempt(u32 odds);
  void at(const char* doing, Site site);

  // primitives
  void load(void* to, const void* from, u32 bytes, Scope scope, Site site);
  void store(void* to, const void* from, u32 bytes, Scope scope, Site site);
  u32 add(u32* p, u32 x, Site site);
  u32 meet(Meeting meeting, u32 value, u32 source, Site site);
  void release_warp(Block& block, u32 warp);
  void barrier(u32 id, u32 threads, Site site);
  void release_barrier(Barrier& barrier);
  void dependency_wait(Site site);
  void dependency_trigger();
  void spin_pause();
  void cluster_open(u64* gates, u32 count, u32 bytes, Site site);
  void cluster_post(u32* variable, u32 word, u64* gate, u32 to, Site site);
  bool cluster_arrived(const u64* gate, Site site);
  char* in_block(Block& target, const void* variable);
  void* shared(const void* key, size_t bytes);
  void check_stuck(const Block& block);

  // reports
  [[noreturn]] void fail(const std::string& what);
  std::string where_all_stand() const;
  std::string where_block_stands(const Block& block) const;

  const Options options;
  Random random;
  std::map<const char*, Region> regions;
  Region* last_region = nullptr;
  std::vector<Rank> ranks;
  std::vector<Parcel> parcels;            // a heap, the first due on top
  std::unordered_map<u64, u64> last_due;  // of the stores of one thread to one word
  std::unordered_map<u64, u32> late;      // how many stores to a word of own memory are on their way
  u64 steps = 0, now_ns = 0;
  u64 parcels_sent = 0, threads_made = 0, blocks_made = 0, blocks_ended = 0;
  u32 runnable = 0;
  u64 leap_ns = 0, idle_ns = 0;
  // What a seed chooses once.
  u32 system_odds, plain_odds, burst, epoch_steps, quiet_odds;
  std::vector<u32> pair_delay, pair_loss;  // from * ranks + to
  std::string failure;

  static Impl* active;
  static Thread* current;
};

Machine::Impl* Machine::Impl::active = nullptr;
Thread* Machine::Impl::current = nullptr;

// Seeds differ in kind, not only in order: how often threads change, how long a block keeps the machine, how much the
// ranks drift apart, which pair of ranks has a slow link.
Machine::Impl::Impl(u32 world, u64 seed, Options options) : options(options), random(seed), ranks(world) {
  static constexpr u32 kOdds[] = {1, 4, 32}, kBurst[] = {1, 8, 64}, kEpoch[] = {64, 1024, 16384},
                       kDelay[] = {0, 1, 1, 8}, kQuiet[] = {32, 256, 2048};
  system_odds = kOdds[random.below(3)];
  plain_odds = 16 * system_odds;
  burst = kBurst[random.below(3)];
  epoch_steps = kEpoch[random.below(3)];
  quiet_odds = kQuiet[random.below(3)];
  for (u32 i = 0; i < world * world; ++i) pair_delay.push_back(kDelay[random.below(4)]);
  pair_loss.resize(world * world);
}

// ---- memory

void* Machine::Impl::alloc_bytes(u32 rank, size_t bytes, const char* name) {
  Guarded memory(bytes);
  char* begin = memory.begin();
  regions.emplace(begin, Region{std::move(memory), rank, name});
  return begin;
}

Region& Machine::Impl::find(const void* p, u32 bytes) {
  const char* at = static_cast<const char*>(p);
  auto inside = [&](const Region& r) {
    return at >= r.memory.begin() && at + bytes <= r.memory.begin() + r.memory.bytes();
  };
  if (last_region && inside(*last_region)) {
    if (reinterpret_cast<uintptr_t>(at) % bytes == 0) return *last_region;
    fail(text("misaligned %u-byte access to '%s'", bytes, last_region->name.c_str()));
  }
  auto next = regions.upper_bound(at);
  if (next == regions.begin()) fail("access outside of all device memory");
  Region& region = std::prev(next)->second;
  if (!inside(region)) {
    fail(text("%u-byte access out of bounds: byte %lld of '%s' of rank %u, which has %zu", bytes,
              i64(at - region.memory.begin()), region.name.c_str(), region.rank, region.memory.bytes()));
  }
  last_region = &region;
  return find(p, bytes);
}

void Machine::Impl::check_fences() {
  for (auto& [begin, region] : regions) {
    if (!region.memory.intact()) fail(text("written outside of '%s' of rank %u", region.name.c_str(), region.rank));
  }
}

// ---- blocks and grids

void Machine::Impl::launch(u32 rank, u32 grid, u32 block, std::function<void()> kernel, Launch how) {
  if (rank >= ranks.size() || grid == 0 || block == 0 || block > 1024 || how.cluster == 0 || grid % how.cluster != 0)
    fail("launch with an impossible geometry");
  Rank& r = ranks[rank];
  auto g = std::make_unique<Grid>();
  g->rank = rank;
  g->number = r.launches++;
  g->blocks = grid;
  g->block_threads = block;
  g->cluster = how.cluster;
  g->pdl = how.pdl;
  g->kernel = std::move(kernel);
  g->previous_complete = r.stream.empty() || r.stream.back()->complete;
  for (u32 i = 0; i < grid / how.cluster; ++i) g->order.push_back(i);
  if (!options.in_index_order) {
    for (u32 i = grid / how.cluster - 1; i > 0; --i) std::swap(g->order[i], g->order[random.below(i + 1)]);
  }
  r.stream.push_back(std::move(g));
}

bool Machine::Impl::may_start(const Rank& rank, size_t position) const {
  if (position == 0) return true;
  const Grid& before = *rank.stream[position - 1];
  return rank.stream[position]->pdl && before.released == before.blocks;
}

bool Machine::Impl::start_one(u32 rank) {
  Rank& r = ranks[rank];
  for (size_t i = 0; i < r.stream.size() && may_start(r, i); ++i) {
    Grid& grid = *r.stream[i];
    if (grid.started == grid.blocks) continue;
    if (!r.blocks.empty() && r.blocks.size() + grid.cluster > options.resident_blocks) return false;
    u32 first = grid.order[grid.started / grid.cluster] * grid.cluster;
    auto cluster = std::make_shared<Cluster>();
    for (u32 block = 0; block < grid.cluster; ++block) start_block(grid, first + block, cluster);
    grid.started += grid.cluster;
    return true;
  }
  return false;
}

bool Machine::Impl::start_any() {
  u32 first = random.below(u32(ranks.size()));
  for (u32 i = 0; i < ranks.size(); ++i) {
    if (start_one((first + i) % u32(ranks.size()))) return true;
  }
  return false;
}

// An exception cannot leave a fiber: a driver's `expect` inside a kernel ends here, and the scheduler throws it again.
void run_thread(void* argument) {
  Thread* t = static_cast<Thread*>(argument);
  try {
    t->block->grid->kernel();
  } catch (const Failure& failure) {
    Machine::Impl::active->failure = failure.what();
  }
  t->state = State::done;
}

void Machine::Impl::start_block(Grid& grid, u32 index, const std::shared_ptr<Cluster>& cluster) {
  progress(grid.rank);
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->id = ++blocks_made;
  block->cluster = cluster;
  cluster->blocks.push_back(block.get());
  block->index = index;
  block->living = grid.block_threads;
  block->warps.resize((grid.block_threads + kWarp - 1) / kWarp);
  block->threads = std::make_unique<Thread[]>(grid.block_threads);
  for (u32 i = 0; i < grid.block_threads; ++i) {
    Thread& t = block->threads[i];
    t.block = block.get();
    t.index = i;
    t.id = ++threads_made;
    t.fiber.start(run_thread, &t);
    block->warps[i / kWarp].living |= 1u << i % kWarp;
    make_runnable(t);
  }
  ranks[grid.rank].blocks.push_back(std::move(block));
}

// Meeting points wait for the living only, as hardware does: a thread that leaves may be the one that was waited for.
void Machine::Impl::retire(Thread& t) {
  Block& block = *t.block;
  progress(block.grid->rank);
  t.state = State::runnable;  // for put_to_sleep, which takes it off the list
  put_to_sleep(t);
  t.state = State::done;
  t.doing = "done";
  Warp& warp = block.warps[t.index / kWarp];
  warp.living &= ~(1u << t.index % kWarp);
  if (--block.living == 0) return retire_block(block);
  if (warp.living && warp.waiting == warp.living) release_warp(block, t.index / kWarp);
  if (block.barriers[0].waiting.size() == block.living) release_barrier(block.barriers[0]);
  check_stuck(block);
}

void Machine::Impl::retire_block(Block& block) {
  for (auto& [key, memory] : block.shared) {
    if (!memory.intact())
      fail(text("block %u of rank %u wrote outside of a shared variable", block.index, block.grid->rank));
  }
  Grid& grid = *block.grid;
  if (block.incoming != 0)
    fail(text("block %u of rank %u ended before %u words from its cluster came", block.index, grid.rank,
              block.incoming));
  block.cluster->blocks[block.index % grid.cluster] = nullptr;
  if (!block.triggered) ++grid.released;
  ++grid.ended;
  ++blocks_ended;
  auto& blocks = ranks[grid.rank].blocks;
  auto self = std::find_if(blocks.begin(), blocks.end(), [&](auto& b) { return b.get() == &block; });
  std::swap(*self, blocks.back());
  blocks.pop_back();
  finish_if_complete(grid);
}

void Machine::Impl::finish_if_complete(Grid& grid) {
  if (grid.ended != grid.blocks || grid.undelivered != 0) return;
  progress(grid.rank);
  grid.complete = true;
  auto& stream = ranks[grid.rank].stream;
  auto self = std::find_if(stream.begin(), stream.end(), [&](auto& g) { return g.get() == &grid; });
  if (auto next = self + 1; next != stream.end()) {
    (*next)->previous_complete = true;
    for (Thread* t : (*next)->dependents) {
      --t->block->awaiting_others;
      make_runnable(*t);
    }
    (*next)->dependents.clear();
  }
  while (!stream.empty() && stream.front()->complete) stream.pop_front();
}

// ---- undelivered stores

namespace {
u64 word_key(u64 thread, const char* p) { return (reinterpret_cast<uintptr_t>(p) / 4) * 0x9e3779b97f4a7c15 ^ thread; }
}  // namespace

// Delays are counted in rounds, the steps it takes everybody to move once: most stores arrive within a round or
// a few, some after everybody else has done a great deal.
Parcel Machine::Impl::parcel(char* to, const void* from, u32 bytes, u32 rank) {
  const Thread& t = *current;
  Grid& grid = *t.block->grid;
  u32 round = runnable + 1, kind = random.below(8);
  u32 spread = kind < 4 ? round : kind < 7 ? 8 * round : 64 * round;
  u64 delay = random.below(spread) * pair_delay[grid.rank * ranks.size() + rank], tie = random.next();
  Parcel out{steps + delay, tie, ++parcels_sent, t.id, t.block->id, t.barriers, &grid, to, bytes, rank, {}};
  std::memcpy(out.data.data(), from, bytes);
  return out;
}

void Machine::Impl::push(const Parcel& parcel) {
  ++parcel.grid->undelivered;
  parcels.push_back(parcel);
  std::push_heap(parcels.begin(), parcels.end(), later);
}

void Machine::Impl::send(char* to, const void* from, u32 bytes, u32 peer) {
  u32 here = current->block->grid->rank, loss = pair_loss[here * ranks.size() + peer];
  if (loss != 0 && random.one_in(loss)) return;
  Parcel out = parcel(to, from, bytes, peer);
  for (u32 i = 0; i < bytes; i += 4) {
    auto known = last_due.find(word_key(out.thread, to + i));
    if (known != last_due.end()) out.due = std::max(out.due, known->second + 1);
  }
  for (u32 i = 0; i < bytes; i += 4) {
    last_due[word_key(out.thread, to + i)] = out.due;
    if (peer == here) ++late[word_key(0, to + i)];
  }
  push(out);
}

void Machine::Impl::deliver(const Parcel& parcel) {
  progress(parcel.rank);
  std::memcpy(parcel.to, parcel.data.data(), parcel.bytes);
  if (parcel.gate) {
    if (*parcel.gate == 0 || *parcel.gate % 4 != 0 || *parcel.gate > 1 << 20)
      fail("a word comes through a gate that is not open, or has had all its words");
    *parcel.gate -= parcel.bytes;
    --parcel.target->incoming;
  } else {
    for (u32 i = 0; i < parcel.bytes; i += 4) {
      auto known = last_due.find(word_key(parcel.thread, parcel.to + i));
      if (known != last_due.end() && known->second == parcel.due) last_due.erase(known);
      if (auto word = parcel.rank == parcel.grid->rank ? late.find(word_key(0, parcel.to + i)) : late.end();
          word != late.end() && --word->second == 0)
        late.erase(word);
    }
  }
  --parcel.grid->undelivered;
  finish_if_complete(*parcel.grid);
}

void Machine::Impl::deliver_first() {
  std::pop_heap(parcels.begin(), parcels.end(), later);
  Parcel parcel = parcels.back();
  parcels.pop_back();
  deliver(parcel);
}

// Whether a store comes before what the running thread does now: it is its own, or of its block and before a barrier.
bool Machine::Impl::is_known(const Parcel& p) const {
  return !p.gate && (p.thread == current->id || (p.block == current->block->id && p.barriers < current->barriers));
}

// A thread reads back what it wrote: program order holds for one address.
void Machine::Impl::deliver_own(const char* from, u32 bytes) {
  bool pending = false;
  for (u32 i = 0; i < bytes; i += 4)
    pending |= last_due.count(word_key(current->id, from + i)) != 0 || late.count(word_key(0, from + i)) != 0;
  if (!pending) return;
  auto wanted = [&](const Parcel& p) { return p.to < from + bytes && from < p.to + p.bytes && is_known(p); };
  auto rest = std::partition(parcels.begin(), parcels.end(), [&](const Parcel& p) { return !wanted(p); });
  if (rest == parcels.end()) return std::make_heap(parcels.begin(), parcels.end(), later);
  std::vector<Parcel> own(rest, parcels.end());
  parcels.erase(rest, parcels.end());
  std::make_heap(parcels.begin(), parcels.end(), later);
  std::sort(own.begin(), own.end(), [](const Parcel& a, const Parcel& b) { return a.sequence < b.sequence; });
  for (const Parcel& parcel : own) deliver(parcel);
}

// ---- scheduler

void Machine::Impl::run() {
  active = this;
  new_epoch();
  auto busy = [](const Rank& rank) { return !rank.stream.empty(); };
  while (std::any_of(ranks.begin(), ranks.end(), busy)) step();
  check_fences();
  active = nullptr;
}

void Machine::Impl::step() {
  if (random.one_in(8)) {
    u32 rank = random.below(u32(ranks.size()));
    if (random.one_in(ranks[rank].slowness)) start_one(rank);
  }
  Rank* rank = pick_rank();
  if (!rank) return idle();
  Block& block = pick_block(*rank);
  u64 ended = blocks_ended;
  for (u32 i = 0; i < burst && blocks_ended == ended && awake(block); ++i) execute(pick_thread(block));
}

void Machine::Impl::execute(Thread& t) {
  if (++steps > options.step_limit) fail("step limit reached");
  if (steps % epoch_steps == 0) new_epoch();
  now_ns += options.ns_per_step;
  current = &t;
  t.fiber.resume();
  current = nullptr;
  if (!failure.empty()) throw Failure(failure);
  if (t.state == State::done) retire(t);
  while (!parcels.empty() && parcels.front().due <= steps) deliver_first();
}

Rank* Machine::Impl::pick_rank() {
  u64 total = 0;
  for (const Rank& rank : ranks) total += awake(rank) ? rank.weight : 0;
  if (total == 0) return nullptr;
  u64 choice = random.next() % total;
  for (Rank& rank : ranks) {
    if (!awake(rank)) continue;
    if (choice < rank.weight) return &rank;
    choice -= rank.weight;
  }
  return nullptr;
}

// Now and then a block is left standing, so that others of its rank overtake it.
Block& Machine::Impl::pick_block(Rank& rank) {
  u32 count = u32(rank.ready.size()), i = random.below(count);
  for (u32 tries = 0; tries < 4 && (rank.ready[i]->stalled_until > steps || !awake(*rank.ready[i])); ++tries)
    i = random.below(count);
  while (!awake(*rank.ready[i])) i = (i + 1) % count;
  Block& block = *rank.ready[i];
  if (random.one_in(256)) block.stalled_until = steps + random.below(16 * runnable + 1);
  return block;
}

// Warps drift apart too: for a while some of them hardly run.
Thread& Machine::Impl::pick_thread(Block& block) {
  if (random.one_in(quiet_odds)) block.quiet_warps = u32(random.next());
  u32 count = u32(block.runnable.size()), i = random.below(count);
  auto wanted = [&](const Thread& t) { return awake(t) && !(block.quiet_warps >> t.index / kWarp & 1); };
  for (u32 tries = 0; tries < 8 && !wanted(*block.runnable[i]); ++tries) i = random.below(count);
  while (!awake(*block.runnable[i])) i = (i + 1) % count;
  return *block.runnable[i];
}

void Machine::Impl::new_epoch() {
  for (Rank& rank : ranks) rank.weight = std::max<u64>(1, (u64(1024) << random.below(8)) / rank.slowness);
}

void Machine::Impl::progress(u32 rank) {
  ++ranks[rank].round;
  leap_ns = idle_ns = 0;
}

void Machine::Impl::count_spinning(Thread& t, i32 n) {
  Rank& rank = ranks[t.block->grid->rank];
  t.block->spinning.add(rank.round, n);
  rank.spinning.add(rank.round, n);
}

// Everybody waits. What is on its way arrives; if nothing is, time passes, faster and faster, until a deadline lets
// somebody go. A round is one turn of each spin, and kernels look at their clock once in many turns: leaps end at a
// second, so that there are thousands of turns in the hour after which it is a hang.
void Machine::Impl::idle() {
  if (start_any()) return;
  if (!parcels.empty()) return deliver_first();
  if (runnable == 0) fail("nothing can run");
  for (Rank& rank : ranks) ++rank.round;
  leap_ns = leap_ns ? std::min(2 * leap_ns, kSecond) : options.ns_per_step;
  now_ns += leap_ns;
  idle_ns += leap_ns;
  if (idle_ns > 3600 * kSecond) fail("a hang: all threads spin, nothing is on its way, and an hour passed");
}

void Machine::Impl::make_runnable(Thread& t) {
  Block& block = *t.block;
  if (block.runnable.empty()) {
    auto& ready = ranks[block.grid->rank].ready;
    block.slot = u32(ready.size());
    ready.push_back(&block);
  }
  t.state = State::runnable;
  t.slot = u32(block.runnable.size());
  block.runnable.push_back(&t);
  ++runnable;
  ++ranks[block.grid->rank].runnable;
  if (!awake(t)) count_spinning(t, 1);
}

void Machine::Impl::put_to_sleep(Thread& t) {
  Block& block = *t.block;
  t.state = State::waiting;
  block.runnable.back()->slot = t.slot;
  std::swap(block.runnable[t.slot], block.runnable.back());
  block.runnable.pop_back();
  --runnable;
  --ranks[block.grid->rank].runnable;
  if (!awake(t)) count_spinning(t, -1);
  if (!block.runnable.empty()) return;
  auto& ready = ranks[block.grid->rank].ready;
  ready.back()->slot = block.slot;
  std::swap(ready[block.slot], ready.back());
  ready.pop_back();
}

void Machine::Impl::yield() { current->fiber.suspend(); }

void Machine::Impl::preempt(u32 odds) {
  if (random.one_in(odds)) yield();
}

void Machine::Impl::at(const char* doing, Site site) {
  current->doing = doing;
  current->site = site;
}

// ---- primitives

void Machine::Impl::load(void* to, const void* from, u32 bytes, Scope scope, Site site) {
  at(scope == Scope::system ? "load_system" : "a plain load", site);
  preempt(scope == Scope::system ? system_odds : plain_odds);
  const Region& region = find(from, bytes);
  if (region.peers_write || region.rank != current->block->grid->rank)
    deliver_own(static_cast<const char*>(from), bytes);
  u32 piece = scope == Scope::system ? options.system_bytes : 16;
  if (bytes <= piece || options.system_bytes == 8) {
    std::memcpy(to, from, bytes);
    return;
  }
  u32 first = random.below(bytes / piece);
  for (u32 i = 0; i < bytes / piece; ++i) {
    if (i != 0) preempt(8 * system_odds);
    u32 at = (first + i) % (bytes / piece) * piece;
    std::memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, piece);
  }
}

void Machine::Impl::store(void* to, const void* from, u32 bytes, Scope scope, Site site) {
  at(scope == Scope::system ? "store_system" : "a plain store", site);
  preempt(scope == Scope::system ? system_odds : plain_odds);
  Region& region = find(to, bytes);
  bool own = region.rank == current->block->grid->rank;
  if (own && region.peers_write && scope == Scope::plain) return send(static_cast<char*>(to), from, bytes, region.rank);
  if (own) {
    if (region.peers_write) deliver_own(static_cast<const char*>(to), bytes);
    progress(region.rank);
    std::memcpy(to, from, bytes);
    return;
  }
  region.peers_write = true;
  u32 piece = std::min(bytes, scope == Scope::system ? options.system_bytes : 4);
  for (u32 i = 0; i < bytes; i += piece) {
    send(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, piece, region.rank);
  }
}

u32 Machine::Impl::add(u32* p, u32 x, Site site) {
  at("an atomic addition", site);
  preempt(system_odds);
  Region& region = find(p, sizeof(u32));
  progress(region.rank);
  if (region.rank != current->block->grid->rank) fail("an atomic addition to a peer's memory");
  if (region.peers_write) deliver_own(reinterpret_cast<const char*>(p), sizeof(u32));
  u32 old = *p;
  *p = old + x;
  return old;
}

u32 Machine::Impl::meet(Meeting meeting, u32 value, u32 source, Site site) {
  static constexpr const char* kNames[] = {"shuffle", "any/all", "sync_warp"};
  Thread& t = *current;
  at(kNames[u32(meeting)], site);
  t.meeting = meeting;
  t.value = value;
  t.source = source;
  put_to_sleep(t);
  Warp& warp = t.block->warps[t.index / kWarp];
  warp.waiting |= 1u << t.index % kWarp;
  if (warp.waiting == warp.living) {
    release_warp(*t.block, t.index / kWarp);
  } else {
    check_stuck(*t.block);
  }
  yield();
  return t.result;
}

// Every lane's result is taken here: a quick lane may be in the next shuffle before a slow one has left this one.
void Machine::Impl::release_warp(Block& block, u32 index) {
  Warp& warp = block.warps[index];
  Thread* lanes = &block.threads[index * kWarp];
  const Thread& first = lanes[__builtin_ctz(warp.living)];
  u32 votes = 0;
  for (u32 i = 0; i < kWarp; ++i) {
    if (!(warp.living >> i & 1)) continue;
    if (lanes[i].meeting != first.meeting)
      fail("lanes of one warp meet in different operations\n" + where_block_stands(block));
    votes |= u32(lanes[i].value != 0) << i;
  }
  for (u32 i = 0; i < kWarp; ++i) {
    if (!(warp.living >> i & 1)) continue;
    Thread& t = lanes[i];
    if (t.meeting == Meeting::shuffle) {
      if (!(warp.living >> t.source & 1))
        fail(name_of(t) + text(" shuffles from lane %u, which is not there, at ", t.source) + name_of(t.site));
      t.result = lanes[t.source].value;
    } else {
      t.result = votes;
    }
    make_runnable(t);
  }
  warp.waiting = 0;
}

// Barrier 0 is the whole block's, of all threads that still live.
void Machine::Impl::barrier(u32 id, u32 threads, Site site) {
  Thread& t = *current;
  Barrier& barrier = t.block->barriers[id];
  at(id == 0 ? "barrier" : "a named barrier", site);
  if (id != 0 && (threads == 0 || threads % kWarp != 0))
    fail("a named barrier of a number of threads that is no multiple of 32");
  if (!barrier.waiting.empty() && barrier.threads != threads) fail("threads disagree on the size of a named barrier");
  barrier.threads = threads;
  barrier.waiting.push_back(&t);
  put_to_sleep(t);
  if (barrier.waiting.size() == (id == 0 ? t.block->living : threads)) {
    release_barrier(barrier);
  } else {
    check_stuck(*t.block);
  }
  yield();
}

void Machine::Impl::release_barrier(Barrier& barrier) {
  if (!barrier.waiting.empty()) progress(barrier.waiting[0]->block->grid->rank);
  bool whole_block = !barrier.waiting.empty() && &barrier == &barrier.waiting[0]->block->barriers[0];
  for (Thread* t : barrier.waiting) {
    t->barriers += whole_block;
    make_runnable(*t);
  }
  barrier.waiting.clear();
}

void Machine::Impl::dependency_wait(Site site) {
  Thread& t = *current;
  Grid& grid = *t.block->grid;
  at("dependency_wait", site);
  preempt(system_odds);
  if (!grid.pdl || grid.previous_complete) return;
  grid.dependents.push_back(&t);
  ++t.block->awaiting_others;
  put_to_sleep(t);
  yield();
}

// One thread speaks for its block, as on hardware.
void Machine::Impl::dependency_trigger() {
  Block& block = *current->block;
  if (block.triggered) return;
  block.triggered = true;
  ++block.grid->released;
}

void Machine::Impl::spin_pause() {
  if (awake(*current)) {
    current->spun_in = ranks[current->block->grid->rank].round;
    count_spinning(*current, 1);
  }
  yield();
}

// The variable of another block of the cluster that is this block's `variable`.
char* Machine::Impl::in_block(Block& target, const void* variable) {
  const char* p = static_cast<const char*>(variable);
  for (auto& [key, memory] : current->block->shared) {
    if (p < memory.begin() || p >= memory.begin() + memory.bytes()) continue;
    auto there = target.shared.find(key);
    if (there == target.shared.end()) fail("the other block has not come to this shared variable yet");
    return there->second.begin() + (p - memory.begin());
  }
  fail("not a shared variable");
}

void Machine::Impl::cluster_open(u64* gates, u32 count, u32 bytes, Site site) {
  Thread& t = *current;
  at("cluster_open", site);
  preempt(system_odds);
  if (t.index == 0) std::fill_n(gates, count, bytes);
  Cluster& cluster = *t.block->cluster;
  cluster.opening.push_back(&t);
  ++t.block->awaiting_others;
  put_to_sleep(t);
  if (cluster.opening.size() == size_t(t.block->grid->cluster) * t.block->grid->block_threads) {
    progress(t.block->grid->rank);
    for (Thread* thread : cluster.opening) {
      --thread->block->awaiting_others;
      make_runnable(*thread);
    }
    cluster.opening.clear();
  }
  yield();
}

// Words come in any order, and at any time.
void Machine::Impl::cluster_post(u32* variable, u32 word, u64* gate, u32 to, Site site) {
  Thread& t = *current;
  Grid& grid = *t.block->grid;
  at("cluster_post", site);
  preempt(system_odds);
  Block* target = to < grid.cluster ? t.block->cluster->blocks[to] : nullptr;
  if (!target) fail(text("a word to block %u of the cluster, which is not there", to));
  Parcel out = parcel(in_block(*target, variable), &word, sizeof word, grid.rank);
  out.target = target;
  out.gate = reinterpret_cast<u64*>(in_block(*target, gate));
  ++target->incoming;
  push(out);
}

bool Machine::Impl::cluster_arrived(const u64* gate, Site site) {
  at("cluster_arrived", site);
  preempt(system_odds);
  return *gate == 0;
}

void* Machine::Impl::shared(const void* key, size_t bytes) {
  auto& variables = current->block->shared;
  auto known = variables.find(key);
  if (known == variables.end()) known = variables.emplace(key, Guarded(bytes)).first;
  return known->second.begin();
}

// Meeting points are inside the block, so one in which nobody can move never moves again.
void Machine::Impl::check_stuck(const Block& block) {
  if (block.runnable.empty() && block.awaiting_others == 0) {
    fail("a block is stuck: its threads wait in different places\n" + where_block_stands(block));
  }
}

// ---- reports

void Machine::Impl::fail(const std::string& what) {
  std::string message = what + "\n";
  if (current)
    message += "  by " + name_of(*current) + " in " + current->doing + " at " + name_of(current->site) + "\n";
  message += where_all_stand();
  if (!current) throw Failure(message);
  // Inside a fiber the scheduler throws, and the fiber is never resumed: its kernel's frames must not be unwound
  // half-way.
  failure = message;
  for (;;) yield();
}

std::string Machine::Impl::where_block_stands(const Block& block) const {
  std::map<std::string, std::string> places;
  for (u32 i = 0; i < block.grid->block_threads; ++i) {
    const Thread& t = block.threads[i];
    std::string place = t.state == State::done ? "done" : text("%s at ", t.doing) + name_of(t.site);
    u32 last = i;
    while (last + 1 < block.grid->block_threads && block.threads[last + 1].state == t.state &&
           block.threads[last + 1].doing == t.doing && block.threads[last + 1].site.line == t.site.line) {
      ++last;
    }
    places[place] += last == i ? text(" %u", i) : text(" %u-%u", i, last);
    i = last;
  }
  std::string out = text("  rank %u launch %llu block %u:\n", block.grid->rank, block.grid->number, block.index);
  for (auto& [place, threads] : places) out += "    " + place + ": threads" + threads + "\n";
  return out;
}

std::string Machine::Impl::where_all_stand() const {
  constexpr size_t kLimit = 6000;
  std::string out = text("step %llu, %llu ns, %zu stores on their way\n", steps, now_ns, parcels.size());
  for (const Rank& rank : ranks) {
    for (auto& block : rank.blocks) {
      if (out.size() > kLimit) return out + "  ...\n";
      out += where_block_stands(*block);
    }
  }
  return out;
}

// ---- the public side

Machine::Machine(u32 world, u64 seed, Options options) : impl_(std::make_unique<Impl>(world, seed, options)) {}
Machine::~Machine() {
  Impl::active = nullptr;
  Impl::current = nullptr;
}
void* Machine::alloc_bytes(u32 rank, size_t bytes, const char* name) { return impl_->alloc_bytes(rank, bytes, name); }
void Machine::slow(u32 rank, u32 factor) { impl_->ranks[rank].slowness = factor; }
void Machine::lose(u32 from, u32 to, u32 one_in) { impl_->pair_loss[from * impl_->ranks.size() + to] = one_in; }
void Machine::launch(u32 rank, u32 grid, u32 block, std::function<void()> kernel, Launch how) {
  impl_->launch(rank, grid, block, std::move(kernel), how);
}
void Machine::run() { impl_->run(); }
u64 Machine::steps() const { return impl_->steps; }
u64 Machine::clock_ns() const { return impl_->now_ns; }

}  // namespace tpfuse::simt

// ---------------------------------------------------------------------------------------------------------------------
// The primitives that platform.h declares.

namespace tpfuse::host {

using Impl = simt::Machine::Impl;

namespace {
simt::Thread& self() { return *Impl::current; }
}  // namespace

u32 thread_index() { return self().index; }
u32 block_index() { return self().block->index; }
u32 grid_size() { return self().block->grid->blocks; }
u32 block_size() { return self().block->grid->block_threads; }
void load(void* to, const void* from, u32 bytes, Scope scope, Site site) {
  Impl::active->load(to, from, bytes, scope, site);
}
void store(void* to, const void* from, u32 bytes, Scope scope, Site site) {
  Impl::active->store(to, from, bytes, scope, site);
}
u32 add(u32* p, u32 x, Site site) { return Impl::active->add(p, x, site); }
u32 meet(Meeting meeting, u32 value, u32 source_lane, Site site) {
  return Impl::active->meet(meeting, value, source_lane, site);
}
void barrier(Site site) { Impl::active->barrier(0, 0, site); }
void barrier(u32 id, u32 threads, Site site) {
  if (id == 0 || id > 15) Impl::active->fail("named barriers are 1 to 15");
  Impl::active->barrier(id, threads, site);
}
void dependency_wait(Site site) { Impl::active->dependency_wait(site); }
void dependency_trigger() { Impl::active->dependency_trigger(); }
u64 clock_ns() { return Impl::active->now_ns; }
void spin_pause(Site site) {
  Impl::active->at("spin_pause", site);
  Impl::active->spin_pause();
}
void cluster_open(u64* gates, u32 count, u32 bytes, Site site) {
  Impl::active->cluster_open(gates, count, bytes, site);
}
void cluster_post(u32* variable, u32 word, u64* gate, u32 to, Site site) {
  Impl::active->cluster_post(variable, word, gate, to, site);
}
bool cluster_arrived(const u64* gate, Site site) { return Impl::active->cluster_arrived(gate, site); }
void* shared(const void* key, u64 bytes) { return Impl::active->shared(key, bytes); }

}  // namespace tpfuse::host
