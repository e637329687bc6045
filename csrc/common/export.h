// What other libraries may call: everything else in libait_cpu.so stays hidden.
#pragma once

#define AIT_API __attribute__((visibility("default")))
