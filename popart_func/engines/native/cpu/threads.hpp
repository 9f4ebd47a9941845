// Threads that share a kernel's blocks of lanes. They are started once and wait for the next call: to wake one takes
// 10 µs; to start one takes 100 µs, and milliseconds where other programs keep the processors busy. They are POSIX's
// own, since C++'s take a tenth of a second to compile.

// A call that threads may join.
struct SharedCall {
  void (*run)(void*);
  void* argument;
  int open;       // how many more threads may join
  int running;    // how many have joined and not ended
  fenv_t floats;  // how the caller's thread treats numbers: whether it flushes the smallest to zero
  SharedCall* next;
};

class Threads {
 public:
  // Calls work() here and on up to `others` threads at once; returns when all that have begun have ended. Threads that
  // can't be had are left out: whoever runs takes the work of all.
  template <class Work> void share(Work& work, int others) {
    SharedCall call{[](void* argument) { (*static_cast<Work*>(argument))(); }, &work, others, 0, {}, nullptr};
    fegetenv(&call.floats);
    pthread_mutex_lock(&mutex);
    while (count < others && start()) ++count;
    call.next = calls;
    calls = &call;
    pthread_mutex_unlock(&mutex);
    for (int i = 0; i < others; ++i) pthread_cond_signal(&come);
    work();
    pthread_mutex_lock(&mutex);
    SharedCall** at = &calls;
    while (*at != &call) at = &(*at)->next;
    *at = call.next;
    while (call.running) pthread_cond_wait(&left, &mutex);
    pthread_mutex_unlock(&mutex);
  }

 private:
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t come = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
  SharedCall* calls = nullptr;
  int count = 0;

  bool start() {
    const auto run = [](void* threads) -> void* { static_cast<Threads*>(threads)->join_calls(); };
    pthread_t thread;
    return pthread_create(&thread, nullptr, run, this) == 0 && pthread_detach(thread) == 0;
  }

  [[noreturn]] void join_calls() {
    pthread_mutex_lock(&mutex);
    for (;;) {
      SharedCall* call = calls;
      while (call && !call->open) call = call->next;
      if (!call) {
        pthread_cond_wait(&come, &mutex);
        continue;
      }
      --call->open, ++call->running;
      pthread_mutex_unlock(&mutex);
      fesetenv(&call->floats);
      call->run(call->argument);
      pthread_mutex_lock(&mutex);
      if (!--call->running) pthread_cond_broadcast(&left);
    }
  }
};

// The threads of a process. All kernels have the same ones, where the linker can make one variable of those in several
// libraries. They never end, and may wait when the process exits. A fork has none of them, and begins anew.
__attribute__((visibility("default"))) inline Threads* process_threads = [] {
  pthread_atfork(nullptr, nullptr, [] { process_threads = new Threads; });
  return new Threads;
}();

// Calls work(block, first lane, lanes in it) for each block of lanes, on threads. Returns all lanes' error bits.
// A thread that has no memory for a block leaves it to the others.
template <class Block, class Work> static int32_t for_each_block(int64_t lanes, int threads, Work work) {
  const int64_t blocks = (lanes + L - 1) / L;
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> bad{0};
  auto worker = [&] {
    Block* const block = new (std::nothrow) Block;  // not cleared: that takes as long as a step of a large lane
    if (!block) return;
    memset(block->bad, 0, sizeof block->bad);
    for (int64_t i; (i = next++) < blocks;) {
      const int64_t first = i * L;
      work(*block, first, int(lanes - first < L ? lanes - first : L));
      for (int l = 0; l < L; ++l) bad |= block->bad[l];
    }
    delete block;
  };
  const int64_t others = (threads < blocks ? threads : blocks) - 1;
  if (others > 0) process_threads->share(worker, int(others));
  else worker();
  return next < blocks ? bad | NO_MEMORY : int32_t(bad);
}
